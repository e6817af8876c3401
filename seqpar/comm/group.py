"""`Group`: the ranks that share a sequence, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from seqpar.comm.kept import Kept
from seqpar.comm.processes import ProcessTransport
from seqpar.comm.traffic import Count, Traffic
from seqpar.comm.transport import (
    AGREE,
    NO_OPERATION,
    Message,
    Operation,
    Pending,
    ReduceOp,
    Transport,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from seqpar.comm.grid import Grid


_numbers = count()


@dataclass
class Calls:
    """A count of the operations that ranks have agreed on, by which their messages are told apart.

    Args:
        number: of those so far, the same on all ranks of the group.
        name: of the last.
        with_backward: the number of those that agree once more on their way back.
        trusted: calls that were compared once and are not compared again.
        of: those of the whole group, of which this one is a view.
        views: those of the views of this group, by their members.
    """

    number: int = 0
    name: str = ""
    with_backward: int = 0
    trusted: set[str] = field(default_factory=set)
    of: Calls | None = None
    views: dict[tuple[int, ...], Calls] = field(default_factory=dict)

    @staticmethod
    def over(process_group: ProcessGroup) -> Calls:
        """Those over a process group: one count, however many groups are made of it."""
        # docs/design.md: messages are counted by the wire
        return _CALLS.setdefault(process_group, Calls())

    def among(self, members: tuple[int, ...]) -> Calls:
        """Those among some of the ranks: one count, however many views are made of them."""
        return self.views.setdefault(members, Calls(of=self))

    @property
    def operation(self) -> Operation:
        """The operation that is under way."""
        whole = self.of.operation.numbers if self.of else ()
        return Operation((*whole, self.number), self.name)


class Group:
    """The ranks that share a sequence, as one of them sees it; counts what it sends in `traffic`.

    Make one with `Group.of` under torchrun, get one from `seqpar.simulate`, or take `Group.alone()`.
    """

    # docs/design.md: what a model is called with is no dataclass of ours
    def __init__(
        self, transport: Transport, traffic: Traffic | None = None, calls: Calls | None = None
    ) -> None:
        self.transport = transport
        self.traffic = Traffic() if traffic is None else traffic
        self.calls = Calls() if calls is None else calls
        # What compiled code calls it, since torch's ops take no objects; another one for every group.
        # docs/design.md: compiled, a whole call is one op
        self.name = f"group {next(_numbers)}"
        # What has been logged of its calls, not to be logged again.
        self.told: set[str] = set()
        # docs/design.md: schedules are made once
        self.kept = Kept()
        _LIVE[self.name] = self

    def __reduce__(self) -> Any:
        """One rank alone is made anew elsewhere; several are of this process."""
        if self.size > 1:
            raise TypeError(
                f"{self} is of this process and cannot be pickled: save a module's state_dict(), and give "
                "modules their group in the process that uses them"
            )
        return Group.alone, ()

    @staticmethod
    def named(name: str) -> Group:
        """The group of that name in this process.

        Raises:
            RuntimeError: it is gone.
        """
        group = _LIVE.get(name)
        if group is None:
            raise RuntimeError(
                f"the {name} that this code was compiled with is gone; keep the seqpar.Group alive"
            )
        return group

    @staticmethod
    def of(ranks: ProcessGroup | DeviceMesh | None = None, *, patience: float = 60.0) -> Group:
        """A group of a process group or of a 1-D device mesh, by default of all processes; another each time.

        Creates no process group and communicates nothing. Modules that are given the process group itself
        share one group. From then on a thread of this process tells the others, through the store of
        torch.distributed, that it lives and what it waits for.

        Args:
            patience: for how many seconds a rank may be waited for that says nothing, or that waits in
                turn for this one at another operation. Then the wait ends in an error that names it. A rank
                that computes is waited for. The same on all ranks.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            ValueError: the mesh has more than one dimension, or this process is not a member, or patience is
                no positive number.
            TypeError: `ranks` is neither a process group nor a device mesh.
        """
        transport = ProcessTransport.of(ranks, patience)
        return Group(transport, calls=Calls.over(transport.process_group))

    @staticmethod
    def alone() -> Group:
        """A group of one rank, which has nobody to talk to."""
        return Group(_Alone())

    def grid(self, *, ulysses: int | None = None, ring: int | None = None) -> Grid:
        """These ranks in two dimensions, ulysses ranks next to each other. Creates no process group.

        Args:
            ulysses, ring: the degrees; either follows from the other.

        Raises:
            ValueError: the degrees do not multiply to the size of the group.
            TypeError: a degree is not an integer.
        """
        from seqpar.comm.grid import grid  # which needs this class

        return grid(self, ulysses=ulysses, ring=ring)

    @property
    def rank(self) -> int:
        """This rank, 0 ... size - 1, counted in this group."""
        return self.transport.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.transport.size

    @property
    def others(self) -> list[int]:
        """All ranks but this one."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def exchange(
        self, primitive: str, sends: Sequence[Message], receives: Sequence[Message]
    ) -> Pending:
        """Starts a batch of point-to-point messages and counts it. Empty tensors are not sent."""
        sends = [m for m in sends if m[1].numel()]
        receives = [m for m in receives if m[1].numel()]
        for _, x in sends:
            elements = x.numel()
            self.traffic.record(primitive, Count(elements, elements * x.element_size()))
        return self.transport.exchange(primitive, sends, receives, self.calls.operation)

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over ranks of a few numbers on the control device; for agreement."""
        elements = (self.size - 1).bit_length() * x.numel()
        self.traffic.record(AGREE, Count(elements, elements * x.element_size()))
        return self.transport.largest(x, self.calls.operation)

    def all_reduce_(self, x: Tensor, op: ReduceOp) -> None:
        """Reduces in place and counts the 2 (P - 1) / P of the tensor that a ring sends."""
        if self.size > 1 and x.numel():
            elements = -(-2 * (self.size - 1) * x.numel() // self.size)
            self.traffic.record("all_reduce", Count(elements, elements * x.element_size()))
            self.transport.all_reduce(x, op, self.calls.operation)

    def __deepcopy__(self, memo: object) -> Group:
        """Returns itself: a copied model talks to the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"Group(rank={self.rank}, size={self.size})"


# What ranks have agreed on over each process group; keeps none of them alive.
_CALLS: WeakKeyDictionary[ProcessGroup, Calls] = WeakKeyDictionary()
# Groups that are alive, by name; keeps none of them alive.
_LIVE: WeakValueDictionary[str, Group] = WeakValueDictionary()


class _Alone:
    """The transport of a group of one."""

    rank, size = 0, 1
    global_ranks: ClassVar[list[int]] = [0]

    @property
    def control_device(self):  # type: ignore[no-untyped-def]
        raise AssertionError("one rank has nothing to agree on")

    def exchange(
        self,
        primitive: str,
        sends: Sequence[Message],
        receives: Sequence[Message],
        operation: Operation = NO_OPERATION,  # noqa: ARG002
    ) -> Pending:
        assert not [*sends, *receives], f"{primitive}: one rank sends to nobody"
        return _Done()

    def check_device(self, device: torch.device) -> None:
        """Does nothing: there is nobody to send to."""

    def prepare(self, device: torch.device) -> None:
        """Does nothing: there is nobody to prepare for."""

    def all_reduce(self, x: Tensor, op: ReduceOp, operation: Operation) -> None:
        """Does nothing: there is nothing to add."""

    def largest(self, x: Tensor, operation: Operation) -> Tensor:  # noqa: ARG002
        return x

    def gather_objects(self, item: object) -> list[object]:
        return [item]


class _Done:
    def wait(self) -> None:
        """Returns at once: nothing is under way."""
