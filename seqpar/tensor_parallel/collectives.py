"""`Collectives`: what a rank hands to collectives in a block of code, whoever calls them.

DTensor and fully_shard communicate by themselves; a dispatch mode sees each of their collectives, forward
and backward. Not here: point-to-point messages of `Group.exchange`, which `Traffic` counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from seqpar_kernels.torch_internals import (
    COLLECTIVES,
    DispatchMode,
    argument_names,
    parts,
    process_group_named,
)

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]


def sent_fraction(kind: Kind, size: int) -> Fraction:
    """What each of `size` ranks sends in a ring, over the elements that it hands in.

    For a broadcast it is the mean over ranks.
    """
    return {
        "all_reduce": Fraction(2 * (size - 1), size),
        "all_gather": Fraction(size - 1),
        "reduce_scatter": Fraction(size - 1, size),
        "all_to_all": Fraction(size - 1, size),
        "broadcast": Fraction(size - 1, size),
    }[kind]


@dataclass(frozen=True)
class Collective:
    """One call: its kind, the elements of this rank's input, the group's size and its global ranks."""

    kind: Kind
    elements: int
    ranks: tuple[int, ...]

    @property
    def sent(self) -> Fraction:
        """Elements that a ring sends from each rank."""
        return self.elements * sent_fraction(self.kind, len(self.ranks))


class Collectives(DispatchMode):
    """Counts the collectives that are called inside of it, in order. Nests; sees backward.

    Groups of one rank send nothing and are left out.

    Raises:
        NotImplementedError: a collective that it does not know: it must not count too little.
    """

    def __init__(self) -> None:
        parts(COLLECTIVES)  # refused here where they are missing
        super().__init__()
        self.calls: list[Collective] = []

    def on(self, ranks: Iterable[int] | None) -> list[Collective]:
        """The calls of the group of those global ranks; by default all."""
        return [c for c in self.calls if ranks is None or c.ranks == tuple(ranks)]

    def sent(self, ranks: Iterable[int] | None = None) -> dict[Kind, Fraction]:
        """Elements sent by this rank, by kind, as rings send them."""
        total: dict[Kind, Fraction] = {}
        for call in self.on(ranks):
            total[call.kind] = total.get(call.kind, Fraction(0)) + call.sent
        return total

    def calls_by_kind(self, ranks: Iterable[int] | None = None) -> Counter[Kind]:
        """How often each kind was called."""
        return Counter(c.kind for c in self.on(ranks))

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from torch.distributed.tensor import DTensor

        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let it become operations on local tensors first
        given = kwargs or {}
        if getattr(func, "namespace", "") in ("_c10d_functional", "c10d", "_dtensor"):
            self._count(func, args, given)
        return func(*args, **given)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func.name()
        if name in _SILENT:
            return
        if name not in _KNOWN:
            raise NotImplementedError(f"{name} cannot be counted; its volume is not known here")
        kind, tensors = _KNOWN[name]
        named = dict(zip(argument_names(func), args, strict=False)) | kwargs
        group = named.get("process_group")
        group = _group(named["group_name"]) if group is None else _unboxed(group)
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) > 1:
            elements = sum(x.numel() for x in _flat(tensors(named)))
            self.calls.append(Collective(kind, elements, ranks))


def _group(name: Any) -> dist.ProcessGroup:
    if isinstance(name, dist.ProcessGroup):
        return name
    return process_group_named(name)


def _unboxed(group: Any) -> dist.ProcessGroup:
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _flat(x: Any) -> Iterable[Tensor]:
    if isinstance(x, Tensor):
        yield x
    else:
        for part in x:
            yield from _flat(part)


def _argument(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda named: named[name]


# By operator: the kind, and which tensors this rank hands in.
_KNOWN: dict[str, tuple[Kind, Callable[[dict[str, Any]], Any]]] = {
    "_c10d_functional::all_reduce": ("all_reduce", _argument("input")),
    "_c10d_functional::all_reduce_": ("all_reduce", _argument("input")),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", _argument("inputs")),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", _argument("input")),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", _argument("input")),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", _argument("inputs")),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", _argument("input")),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", _argument("inputs")),
    "_c10d_functional::all_to_all_single": ("all_to_all", _argument("input")),
    "_c10d_functional::broadcast": ("broadcast", _argument("input")),
    "_dtensor::shard_dim_alltoall": ("all_to_all", _argument("input")),
    "c10d::allreduce_": ("all_reduce", _argument("tensors")),
    "c10d::allreduce_coalesced_": ("all_reduce", _argument("tensors")),
    "c10d::allgather_": ("all_gather", _argument("input_tensors")),
    "c10d::_allgather_base_": ("all_gather", _argument("input_tensor")),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", _argument("inputs")),
    "c10d::reduce_scatter_": ("reduce_scatter", _argument("input_tensors")),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", _argument("input_tensor")),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", _argument("inputs")),
    "c10d::alltoall_": ("all_to_all", _argument("input_tensors")),
    "c10d::alltoall_base_": ("all_to_all", _argument("input")),
    "c10d::broadcast_": ("broadcast", _argument("tensors")),
}

# Those that bring nothing themselves, and the messages that `Traffic` counts.
_SILENT = {
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
    "c10d::barrier",
    "c10d::send",
    "c10d::recv_",
    "c10d::recv_any_source_",
}
