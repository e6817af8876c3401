"""The ring: blocks visit the ranks that want them, and what is summed for them there comes home.

`ring_pass` brings blocks round while their visitor computes; `RingSum` is its dual. The next hop is
always under way while the current block is worked on, and no rank is sent what it does not want.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from seqpar.comm.group import Group
from seqpar.comm.packed_message import PackedMessage, Tensors
from seqpar.comm.transport import Message, Pending

Wants = Callable[[int, int], bool]  # (visitor, owner): whether the visitor wants the owner's block


@dataclass(frozen=True)
class RingSchedule:
    """A table of where blocks are: at step t the block of rank o is due at rank o + t * direction.

    A block goes from visitor to next neighbour; where that neighbour does not want it, the chain ends, and
    the next one that does gets it from the owner. So every rank that wants a block is sent it once.

    Args:
        rank: this rank.
        rows: how many rows each rank's block has.
        wants: the same answers on every rank.
        direction: 1 or -1.
    """

    rank: int
    rows: Sequence[int]
    wants: Wants = field(default=lambda visitor, owner: True)  # noqa: ARG005
    direction: int = 1

    def at(self, steps: int) -> int:
        """The rank so many steps ahead of this one."""
        return (self.rank + steps * self.direction) % self.size

    def owner_at(self, step: int) -> int:
        """The rank whose block is due here at this step: the one so many steps behind."""
        return self.at(-step)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.rows)

    def visits(self, visitor: int, owner: int) -> bool:
        """Whether the block is sent to the visitor; it is not sent to its owner."""
        return visitor != owner and self.wants(visitor, owner)

    def follows(self, visitor: int, owner: int) -> bool:
        """Whether the neighbour before the visitor has the block too, be it as its owner."""
        before = (visitor - self.direction) % self.size
        return before == owner or self.visits(before, owner)

    def goes_far(self, step: int) -> bool:
        """Whether this rank's block is sent straight to the rank where it is due after this step."""
        far = self.at(step + 1)
        return step > 0 and self.visits(far, self.rank) and not self.follows(far, self.rank)

    @cached_property
    def is_awaited(self) -> bool:
        """Whether anybody else wants this rank's block."""
        return any(self.visits(rank, self.rank) for rank in range(self.size))

    @cached_property
    def last_far(self) -> int:
        """The last step after which this rank's block is sent far."""
        return max((step for step in range(self.size - 1) if self.goes_far(step)), default=0)

    @cached_property
    def most_rows(self) -> int:
        """The rows of the largest block."""
        return max(self.rows)


def ring_pass(
    block: Tensors, schedule: RingSchedule, group: Group, *, primitive: str = "ring_pass"
) -> Iterator[tuple[int, Tensors | None]]:
    """Yields (owner, block of that owner, or `None` if this rank does not want it), for all P owners.

    This rank's own comes first. A block must not be used once the next one is asked for, nor written to.

    Args:
        block: this rank's tensors, `[b sl h w]` or `[b sl h]`, packed by `PackedMessage`.
    """
    message = PackedMessage.of(block, schedule.most_rows)
    own = message.pack(block) if schedule.is_awaited else ()
    held: Tensors | None = own
    double = _DoubleBuffer(block, message, schedule.most_rows)
    for step in range(group.size):
        owner, coming = schedule.owner_at(step), schedule.owner_at(step + 1)
        sends: list[Message] = []
        receives: list[Message] = []
        arriving: Tensors | None = None
        if step + 1 < group.size:
            if held is not None and schedule.visits(schedule.at(1), owner):
                sends += [(schedule.at(1), x) for x in held]
            # docs/design.md: no hop that nobody needs
            if schedule.goes_far(step):
                sends += [(schedule.at(step + 1), x) for x in own]
            if schedule.visits(group.rank, coming):
                source = schedule.at(-1) if schedule.follows(group.rank, coming) else coming
                arriving = double.of(step, schedule.rows[coming])
                receives = [(source, x) for x in arriving]
        pending = group.exchange(primitive, sends, receives)
        if step == 0:
            # The rank's own tensors are handed out as they are; they may not have been packed.
            yield owner, block
        else:
            yield owner, None if held is None else message.unpack(held)
        # The hop is waited for only here, so that the caller has computed while it was under way.
        pending.wait()
        held = arriving
        if step >= schedule.last_far:
            own = ()  # nobody is sent it any more, and it would live on for the whole round


class _Coming(NamedTuple):
    """Sums on their way here: one to be continued, and one of this rank's own block."""

    pending: Pending
    for_next: Tensor | None
    for_home: Tensor | None


class RingSum:
    """Sums, for each block, what every visitor adds to it, at the rank that owns it.

    In every step of a `ring_pass` on the same schedule, for a wanted block or not: `with sums.share()` gives
    tensors to add to and sends them on. Sums follow the blocks and go home from where a chain ends. Of three
    ranks that want all blocks, on rank 0::

        step   adds to the sum of   which then goes to   meanwhile comes the sum of
        0      block 0, its own     nowhere
        1      block 2              rank 1               block 1, from rank 2, to be added to
        2      block 1              rank 1, its owner    block 0, from rank 2, with the others' shares

    Args:
        like: this rank's tensors that the sums are for; a sum has their shapes, all in the type of sums.
        in_order: a visitor continues the sum that arrived instead of adding its own to it, beginning with
            the owner: additions are made in the order of the ring, and the sum cannot travel while the
            visitor computes. Otherwise the owner's share stays at home, one hop less.
    """

    def __init__(
        self,
        like: Tensors,
        schedule: RingSchedule,
        group: Group,
        *,
        in_order: bool = False,
        primitive: str = "ring_sum",
    ) -> None:
        self._schedule, self._group, self._like, self._in_order = schedule, group, like, in_order
        self._message = PackedMessage.of(like).of_sums()
        self._primitive = primitive
        self._step = 0
        self._coming: _Coming | None = None
        self._arrived: Tensor | None = None  # a sum to be continued here, in the step that begins
        self._total: Tensor | None = None  # of this rank's own block

    @contextmanager
    def share(self) -> Iterator[Tensors | None]:
        """The tensors to add this rank's share to, or `None` if it does not want the block.

        At the end of the `with` the sum goes to the next visitor, or home.
        """
        share = self._begun()
        yield None if share is None else self._message.unpack((share,))
        self._land()
        if share is not None and self._arrived is not None:
            share += self._arrived
        self._arrived = None
        self._hand_on(share)
        self._step += 1

    def _begun(self) -> Tensor | None:
        """What this rank adds its share to in this step: zeros, or what arrived."""
        schedule, rank = self._schedule, self._schedule.rank
        owner = schedule.owner_at(self._step)
        if owner != rank and not schedule.visits(rank, owner):
            return None
        if self._in_order:
            # What arrived is continued and not added to, so it must be here before the rank computes.
            self._land()
            arrived, self._arrived = self._arrived, None
            if arrived is not None:
                return arrived
        return self._empty(schedule.rows[owner]).zero_()

    def _hand_on(self, share: Tensor | None) -> None:
        """Sends the sum of this step on, or home, and begins to receive those that come here."""
        schedule, rank, step = self._schedule, self._schedule.rank, self._step
        owner, coming = schedule.owner_at(step), schedule.owner_at(step + 1)
        sends: list[Message] = []
        receives: list[Message] = []
        goes_on = schedule.visits(schedule.at(1), owner)
        # docs/design.md: the ring's own gradients stay at home
        if share is not None and owner == rank and not (self._in_order and goes_on):
            self._total = share
        elif share is not None:
            sends = [(schedule.at(1) if goes_on else owner, share)]
        for_next = for_home = None
        if self._is_continued(coming):
            for_next = self._empty(schedule.rows[coming])
            receives.append((schedule.at(-1), for_next))
        # The sum for this rank's block is now at `last`, and comes home unless the next rank wants it too.
        last = schedule.at(step)
        if (
            step
            and schedule.visits(last, rank)
            and not schedule.visits(schedule.at(step + 1), rank)
        ):
            for_home = self._empty(schedule.rows[rank])
            receives.append((last, for_home))
        pending = self._group.exchange(self._primitive, sends, receives)
        self._coming = _Coming(pending, for_next, for_home)

    def home(self) -> Tensors:
        """This rank's own block, with the shares of all ranks."""
        self._land()
        assert self._total is not None, "every block had its step"
        return self._message.unpack((self._total,))

    def _is_continued(self, owner: int) -> bool:
        """Whether the neighbour before this rank sends the sum of the owner's block here."""
        schedule = self._schedule
        if not schedule.visits(schedule.rank, owner):
            return False
        return (
            # An owner hands its sum on only in order; otherwise its share stays at home.
            self._in_order if schedule.at(-1) == owner else schedule.follows(schedule.rank, owner)
        )

    def _land(self) -> None:
        """Waits for what is on its way here."""
        coming, self._coming = self._coming, None
        if coming is None:
            return
        coming.pending.wait()
        if coming.for_next is not None:
            self._arrived = coming.for_next
        if coming.for_home is not None:
            total = self._total
            self._total = coming.for_home if total is None else total.add_(coming.for_home)

    def _empty(self, rows: int) -> Tensor:
        b, _, h = self._like[0].shape[:3]
        return self._message.empty(self._like[0], rows, b, h)[0]


class _DoubleBuffer:
    """A pair of blocks to receive in by turns, each made when it is first needed."""

    def __init__(self, block: Tensors, message: PackedMessage, rows: int) -> None:
        self._shape = rows, block[0].shape[0], block[0].shape[2]
        self._block, self._message = block, message
        self._buffers: list[Tensors | None] = [None, None]

    def of(self, step: int, rows: int) -> Tensors:
        """The buffer of a step, for so many rows."""
        # The other buffer has the block that is in use while this one is filled.
        buffer = self._buffers[step % 2]
        if buffer is None:
            buffer = self._message.empty(self._block[0], *self._shape)
            self._buffers[step % 2] = buffer
        return tuple(x[:rows] for x in buffer)
