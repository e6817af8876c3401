"""Modules in tiles of rows: `tiled` for one call, `tiled_mlps` for the MLPs of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from seqpar.row_tiles import check_tile, in_tiles


def tiled(
    function: Callable[..., Tensor],
    *rows: Tensor,
    tile: int,
    dim: int = 1,
    modules: Sequence[nn.Module] = (),
) -> Tensor:
    """What `function(*rows)` gives, of `tile` rows at a time: `tiled(mlp, x, tile=1024)` for x `[b sl e]`.

    Forward keeps rows alone and backward computes each tile again, with the same random numbers. Learned
    tensors get one gradient, summed over tiles in float32 or wider. Sends nothing; ranks may differ in the
    number of tiles.

    Each row of the result must depend on the same row of `rows` alone. That does not hold for batch norm, for
    experts with a capacity, and for losses that balance experts: tiled, these are others, and nothing tells.

    Args:
        function: gives one tensor, with the rows of its part. Arguments that have no rows it brings along:
            `tiled(lambda x: mlp(x, scale), x, tile=1024, modules=[mlp])`.
        rows: tensors of the same length along `dim`.
        tile: how many rows at a time, times the batch; the last tile may be shorter.
        dim: along which rows are counted.
        modules: where the parameters are that the function learns, if it is no module and no method of one.

    Raises:
        ValueError: tile is less than 1, tensors differ in their rows, the function gives others, or uses a
            learned tensor that is neither in its rows nor in the modules, whose gradient would be lost.
        NotImplementedError: a parameter or a tensor is a DTensor, as parameters are under FSDP2 outside of a
            model's forward; the function gives no single tensor; or in `torch.compile(fullgraph=True)`.
    """
    check_tile(tile, *rows)  # before a compiler looks at what follows
    holder = _Holder(function, modules)
    learned = {name: p for name, p in holder.named_parameters() if p.requires_grad}

    def of_tile(parts: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        return functional_call(holder, dict(zip(learned, parameters, strict=True)), tuple(parts))

    return in_tiles(of_tile, rows, tuple(learned.values()), tile=tile, dim=dim)


class _Holder(nn.Module):
    """A function and its modules as one module, so that torch can exchange their parameters."""

    def __init__(self, function: Callable[..., Tensor], modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.function = function  # registered, if it is a module
        owner = getattr(function, "__self__", None)
        self.others = nn.ModuleList([*modules, *([owner] if isinstance(owner, nn.Module) else [])])

    def forward(self, *rows: Tensor) -> Tensor:
        return self.function(*rows)


@contextmanager
def tiled_mlps(model: nn.Module, *, tile: int, name: str = "mlp") -> Iterator[list[str]]:
    """A block in which every MLP of a model computes `tile` rows at a time, by `seqpar.tiled`.

    `with seqpar.tiled_mlps(model, tile=1024): train(model)`. Gives the names of the modules. Parameters,
    their names, hooks and wrappers stay. A model may be wrapped before or in the block; a copy stays tiled.
    Backward of checkpointed blocks belongs in it too: what they recompute must be what they computed.

    Args:
        name: the last part of the names of its MLPs; "feed_forward" in some models.

    Raises:
        ValueError: no module has this name, or the forward of one has been exchanged already.
        NotImplementedError: one is a mixture of experts, whose router tells its scores to losses by the side.
    """
    found = {n: m for n, m in model.named_modules() if n.split(".")[-1] == name}
    if not found:
        raise ValueError(f"no module is named {name!r} in {type(model).__name__}; give `name`")
    for path, module in found.items():
        if "forward" in vars(module):
            raise ValueError(
                f"the forward of {path} has been exchanged already, by a block or a library"
            )
        if any(n.split(".")[-1] == "experts" for n, _ in module.named_modules()):
            raise NotImplementedError(
                f"{path} is a mixture of experts, whose router must see all rows at once; tile its dense "
                "parts with seqpar.tiled"
            )
    forward = _forward_in_tiles(tile)
    for module in found.values():
        # A method, so that a copy of the module has its own.
        vars(module)["forward"] = MethodType(forward, module)
    try:
        yield list(found)
    finally:
        for module in found.values():
            del vars(module)["forward"]


def _forward_in_tiles(tile: int) -> Callable[..., Tensor]:
    def forward(self: nn.Module, x: Tensor, *others: Any, **named: Any) -> Tensor:
        def of_rows(rows: Tensor) -> Tensor:
            return type(self).forward(self, rows, *others, **named)

        return tiled(of_rows, x, tile=tile, dim=x.ndim - 2, modules=[self])

    return forward
