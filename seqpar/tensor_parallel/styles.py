"""From rules to torch's tensor-parallel styles: how a module's weights are placed, what it reads and writes.

Between modules tensors are local and plain, "whole" on every rank or "sharded" along their last dimension, so
that models and attention see no DTensor. torch's own styles do nn.Linear and nn.Embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from seqpar.comm import Group
from seqpar.tensor_parallel.cut import Cut, deal_halves
from seqpar.tensor_parallel.width import Width

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # without a forward of their own
_PLACEMENT: dict[str, Placement] = {"whole": Replicate(), "sharded": Shard(-1)}


def place(
    model: nn.Module, cuts: Mapping[str, Cut], shared_inputs: Iterable[str], mesh: DeviceMesh
) -> None:
    """Cuts the modules of those paths in place, by a 1-D mesh.

    Weights must be the same on all ranks: each keeps its part of its own. Weights that are one parameter
    under several names stay one.

    Args:
        shared_inputs: modules whose input several of their children read whole. It is made a DTensor once, so
            that the children's gradients are added before they are reduced, not after.
    """
    tied = _tied(model)
    done: set[nn.Module] = set()  # one that is there under several names is cut once
    for path, cut in cuts.items():
        module = model.get_submodule(path)
        if module in done:
            continue
        done.add(module)
        if cut.halves:
            _deal_halves(module, mesh.size())
        parallelize_module(module, mesh, _style(cut), src_data_rank=None)
        if cut.kind == "linear" and cut.dim == 1:
            # What leaves a DTensor is a view, to which Falcon could not add in place.
            module.register_forward_hook(_copied)
    for path in shared_inputs:
        parallelize_module(model.get_submodule(path), mesh, _SharedInput(), src_data_rank=None)
    for first, *others in tied:
        for name in others:
            _set(model, name, model.get_parameter(first))


def _style(cut: Cut) -> ParallelStyle:
    reads, writes = _PLACEMENT[cut.reads], _PLACEMENT[cut.writes]
    if cut.kind == "linear" and cut.dim is not None:
        by = ColwiseParallel if cut.dim == 0 else RowwiseParallel
        return by(input_layouts=reads, output_layouts=writes)
    if cut.kind == "embedding" and cut.dim is not None:
        if cut.dim == 1:
            return ColwiseParallel(output_layouts=writes)
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=writes)
    return _WidthNorm() if cut.kind == "norm" and cut.dim == 0 else _Placed(cut)


class _Placed(ParallelStyle):
    """A module of another kind: its weights are placed, and it computes on DTensors."""

    def __init__(self, cut: Cut) -> None:
        super().__init__()
        self._cut = cut
        self._reads = Shard(-2) if cut.per_head else _PLACEMENT[cut.reads]
        self._writes = Shard(-2) if cut.per_head else _PLACEMENT[cut.writes]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        read: Any = self._read
        write: Any = self._write  # hooks may return what replaces; torch's type says None
        return distribute_module(module, device_mesh, self._place, read, write)

    def _place(self, _: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(
                parameter, mesh, [self._placement(parameter)], src_data_rank=None
            )
            fresh = nn.Parameter(placed, requires_grad=parameter.requires_grad)
            module.register_parameter(name, fresh)
            if self._cut.per_head and fresh.requires_grad:
                # Ranks hold other heads: what they give the one weight is added up at once.
                fresh.register_hook(_whole)

    def _placement(self, parameter: Tensor) -> Placement:
        cut = self._cut
        if cut.dim is None:
            return Replicate()
        if cut.kind == "transposed linear" and parameter.ndim == 1:
            return Shard(0) if cut.dim == 1 else Replicate()
        return Shard(cut.dim)

    def _read(self, _: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        x = _as_dtensor(inputs[0], mesh, self._reads)
        if self._cut.kind == "transposed linear" and self._cut.dim is not None:
            needed = Replicate() if self._cut.dim == 1 else Shard(-1)
            x = x.redistribute(placements=[needed])
        return (x, *inputs[1:])

    def _write(self, _: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
        return output.redistribute(mesh, [self._writes]).to_local()


class _WidthNorm(ParallelStyle):
    """A norm over a sharded width: its weight is cut, its input stands for whole rows."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = Group.of(device_mesh)

        def read(_: nn.Module, inputs: tuple[Any, ...], __: DeviceMesh) -> Any:
            return (Width.of(inputs[0], group), *inputs[1:])

        def write(_: nn.Module, output: Any, __: DeviceMesh) -> Any:
            return output.plain()

        return distribute_module(module, device_mesh, _cut_weight, read, write)


class _SharedInput(ParallelStyle):
    """The first input of a module, by position or as `hidden_states`, becomes one replicated DTensor."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def prepare(
            module: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if inputs:
                return (_as_dtensor(inputs[0], device_mesh, Replicate()), *inputs[1:]), given
            if "hidden_states" not in given:
                raise TypeError(
                    f"{type(module).__name__} must be given its input first, or as hidden_states, "
                    f"got {sorted(given)}"
                )
            x = _as_dtensor(given["hidden_states"], device_mesh, Replicate())
            return inputs, given | {"hidden_states": x}

        module.register_forward_pre_hook(prepare, with_kwargs=True)
        return module


def _cut_weight(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        placed = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(placed, parameter.requires_grad))


def _as_dtensor(x: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [placement])


def _copied(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.clone()


def _whole(gradient: Tensor) -> Tensor:
    assert isinstance(gradient, DTensor)
    return gradient.redistribute(placements=[Replicate()])


def _deal_halves(module: nn.Module, size: int) -> None:
    """Reorders rows so that part r of `size` holds part r of both halves."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        dealt = deal_halves(parameter.detach(), size)
        module.register_parameter(name, nn.Parameter(dealt, parameter.requires_grad))


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path).register_parameter(leaf, parameter)


def shard_weights(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spreads all weights over a 1-D mesh too, with torch's fully_shard: layer by layer, then the rest.

    A layer is what is in an nn.ModuleList, with all that is in it. Their ranks have other rows of the batch;
    gradients are averaged.
    """
    for layer in list(_layers(model)):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are in lists."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, _CONTAINERS):
            yield child
        else:
            yield from _layers(child)


def reshard_weights(model: nn.Module) -> None:
    """Lets go of what fully_shard gathered for a forward without a backward: parameters are shards again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_tensor(x: Tensor) -> Tensor:
    """A DTensor gathered; a plain tensor as it is. All ranks of its mesh must call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def cut_alike(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank gives, as a DTensor of the placements of another; sends nothing."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
