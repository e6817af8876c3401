"""`in_tiles`: a function of rows, applied to a few rows at a time.

Forward keeps what it is given. Backward computes each tile again, and sums the gradients of learned tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqpar_kernels import accumulation_dtype, first_only
from seqpar_kernels.partial import without_autocast

# Makes the rows of a tile from its parts of the tensors that have rows, and from the learned tensors.
TileFunction = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def in_tiles(
    of_tile: TileFunction, rows: Sequence[Tensor], learned: Sequence[Tensor], *, tile: int, dim: int
) -> Tensor:
    """As `seqpar.tiled`, of a function that is given what it learns."""
    check_tile(tile, *rows, *learned)
    _check_rows(rows, dim)
    device, grads = rows[0].device, torch.is_grad_enabled()
    learns = grads and any(x.requires_grad for x in (*rows, *learned))
    run = _Run(of_tile, len(rows), tile, dim, learns, _same_casts(device))
    return _Tiled.apply(run, *rows, *learned)


@dataclass(frozen=True)
class _Run:
    """What a call is besides its tensors, and how it is done tile by tile."""

    of_tile: TileFunction
    num_rows: int
    tile: int
    dim: int
    learns: bool
    casts: Callable[[], AbstractContextManager[object]]

    def starts(self, tensors: Sequence[Tensor]) -> range:
        """Where tiles begin; no row is one empty tile."""
        return range(0, max(1, tensors[0].shape[self.dim]), self.tile)

    def part(self, x: Tensor, start: int) -> Tensor:
        """The rows of one tile."""
        return x.narrow(self.dim, start, min(self.tile, x.shape[self.dim] - start))

    def inputs(self, tensors: Sequence[Tensor], start: int) -> list[Tensor]:
        """The rows of one tile and what is learned, beside the graph that they come from.

        Aliases, since hooks on a learned tensor are for its gradient, and not for that of a tile.
        """
        parts = [self.part(x, start) for x in tensors[: self.num_rows]]
        aliases = [x.detach() for x in (*parts, *tensors[self.num_rows :])]
        return [a.requires_grad_(x.requires_grad) for a, x in zip(aliases, tensors, strict=True)]

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        out = self.of_tile(inputs[: self.num_rows], inputs[self.num_rows :])
        if not isinstance(out, Tensor):
            raise NotImplementedError(
                f"what is tiled must give one tensor, got {type(out).__name__}; tile what gives one"
            )
        length = inputs[0].shape[self.dim]
        if out.ndim <= self.dim or out.shape[self.dim] != length:
            raise ValueError(
                f"what is tiled must give {length} rows for {length} along dimension {self.dim}, got "
                f"{tuple(out.shape)}"
            )
        return out


class _Tiled(torch.autograd.Function):
    """rows [... n ...] each, learned tensors -> out [... n ...].

    forward   out of a tile = of_tile(rows of the tile, learned), tile after tile
    backward  each tile again, in the same order; drows tile by tile, dlearned = sum over tiles
    saved     rows and learned
    """

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> Tensor:
        # docs/design.md: rows in tiles are one node of the graph
        ctx.run, ctx.again = run, _same_draws(tensors[0].device) if run.learns else None
        ctx.save_for_backward(*tensors)
        whole = None
        with run.casts():
            for start in run.starts(tensors):
                with torch.set_grad_enabled(run.learns and start == 0):
                    inputs = run.inputs(tensors, start)
                    out = run(inputs)
                    if start == 0 and run.learns:
                        _check_learned(out, inputs)
                out = out.detach()
                if whole is None:
                    shape = list(out.shape)
                    shape[run.dim] = tensors[0].shape[run.dim]
                    whole = out.new_empty(shape)
                run.part(whole, start).copy_(out)
                del out, inputs  # or two tiles would be there at once
        assert whole is not None, "there is a tile"
        return whole

    @staticmethod
    @first_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,), run, tensors = grad_outputs, ctx.run, ctx.saved_tensors
        wanted = [n for n, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
        grads: dict[int, Tensor] = {
            n: torch.zeros_like(tensors[n]) for n in wanted if n < run.num_rows
        }
        with ctx.again(), run.casts(), torch.enable_grad():
            for start in run.starts(tensors):
                inputs = run.inputs(tensors, start)
                found = torch.autograd.grad(
                    run(inputs),
                    [inputs[n] for n in wanted],
                    run.part(dout, start),
                    allow_unused=True,
                )
                for n, grad in zip(wanted, found, strict=True):
                    if grad is None:  # what no tile uses keeps no gradient
                        continue
                    if n < run.num_rows:
                        run.part(grads[n], start).copy_(grad)
                        continue
                    if n not in grads:
                        wide = accumulation_dtype(grad.dtype)
                        grads[n] = torch.zeros_like(tensors[n], dtype=wide)
                    grads[n] += grad
                del found, grad, inputs
        given = (grads[n].to(tensors[n].dtype) if n in grads else None for n in range(len(tensors)))
        return None, *given


def check_tile(tile: int, *tensors: Tensor) -> None:
    """Refuses what is in no case computed in tiles.

    Raises:
        ValueError: tile is less than 1.
        NotImplementedError: a tensor is a DTensor, or a compiler is at work.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError("tiles are not compiled: leave this call out of torch.compile")
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    if any(hasattr(x, "full_tensor") for x in tensors):
        raise NotImplementedError(
            "a DTensor is not computed in tiles; under FSDP2 weights are plain tensors inside of the forward "
            "of the module that it wraps: call this there"
        )


def _check_rows(rows: Sequence[Tensor], dim: int) -> None:
    if not rows:
        raise ValueError("there must be a tensor that has rows, got none")
    shapes = [tuple(x.shape) for x in rows]
    if any(not 0 <= dim < len(shape) for shape in shapes) or len({s[dim] for s in shapes}) > 1:
        raise ValueError(f"tensors must have the same length along dimension {dim}, got {shapes}")


def _check_learned(out: Tensor, inputs: Sequence[Tensor]) -> None:
    """Refuses what a tile learns without being given it: nobody would hand its gradient on."""
    given, seen, ahead = {id(x) for x in inputs}, set(), [out.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in given:
            raise ValueError(
                f"what is tiled uses a tensor {tuple(leaf.shape)} that wants a gradient, and is neither in "
                "the rows nor in the modules: give its module in `modules`, or make it one of the rows"
            )
        ahead += [following for following, _ in node.next_functions]


def _same_casts(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """A block under the autocast of now."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return lambda: without_autocast(device)
    # Its cache would hold what each tile casts of its aliases, until the block ends.
    return partial(torch.autocast, kind, torch.get_autocast_dtype(kind), cache_enabled=False)


def _same_draws(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A block in which random numbers are drawn that are drawn from now on."""
    on_device = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    cpu_state = torch.get_rng_state()
    device_state = on_device.get_rng_state(device) if on_device else None

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng([device] if on_device else [], device_type=device.type):
            torch.set_rng_state(cpu_state)
            if on_device:
                on_device.set_rng_state(device_state, device)
            yield

    return again
