"""The ring: blocks visit the ranks that want them, and what is summed for them there comes home.

`ring_pass` brings blocks round while their visitor computes; `RingSum` is its dual. The next hop is
always under way while the current block is worked on, and no rank is sent what it does not want.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from seqpar.comm.group import Group
from seqpar.comm.packed_message import PackedMessage, Tensors
from seqpar.comm.ring_schedule import RingSchedule, SumHop
from seqpar.comm.transport import Message, Pending


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
    for step, hop in enumerate(schedule.hops):
        sends: list[Message] = []
        receives: list[Message] = []
        arriving: Tensors | None = None
        if hop.to_next is not None and held is not None:
            sends += [(hop.to_next, x) for x in held]
        # docs/design.md: no hop that nobody needs
        if hop.far is not None:
            sends += [(hop.far, x) for x in own]
        if hop.source is not None:
            arriving = double.of(step, hop.rows)
            receives = [(hop.source, x) for x in arriving]
        pending = group.exchange(primitive, sends, receives)
        if step == 0:
            # The rank's own tensors are handed out as they are; they may not have been packed.
            yield hop.owner, block
        else:
            yield hop.owner, None if held is None else message.unpack(held)
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
    tensors to write, whole, where `sums.begins`, and else to add to; then it sends them on. Sums follow the
    blocks and go home from where a chain ends. Of three ranks that want all blocks, on rank 0::

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
        self.begins = (
            False  # whether the share at hand holds nothing yet, and is to be written whole
        )
        self._schedule, self._group, self._like, self._in_order = schedule, group, like, in_order
        self._hops = iter(schedule.sum_hops(in_order=in_order))
        self._message = PackedMessage.of(like).of_sums()
        self._primitive = primitive
        self._coming: _Coming | None = None
        self._arrived: Tensor | None = None  # a sum to be continued here, in the step that begins
        self._total: Tensor | None = None  # of this rank's own block

    @contextmanager
    def share(self) -> Iterator[Tensors | None]:
        """Tensors for this rank's share, to write where `begins` or to add to; `None` if it wants no block.

        At the end of the `with` the sum goes to the next visitor, or home.
        """
        hop = next(self._hops)
        share = None if hop.rows is None else self._begun(hop.rows)
        yield None if share is None else self._message.unpack((share,))
        self._land()
        if share is not None and self._arrived is not None:
            share += self._arrived
        self._arrived = None
        self._hand_on(share, hop)

    def _begun(self, rows: int) -> Tensor:
        """What this rank adds its share to in this step: nothing yet, or what arrived."""
        self.begins = False
        if self._in_order:
            # What arrived is continued and not added to, so it must be here before the rank computes.
            self._land()
            arrived, self._arrived = self._arrived, None
            if arrived is not None:
                return arrived
        self.begins = True
        return self._empty(rows)

    def _hand_on(self, share: Tensor | None, hop: SumHop) -> None:
        """Sends the sum of this step on, or home, and begins to receive those that come here."""
        sends: list[Message] = []
        receives: list[Message] = []
        for_next = for_home = None
        if share is not None and hop.to is None:
            self._total = share
        elif share is not None and hop.to is not None:
            sends = [(hop.to, share)]
        if hop.rows_for_next is not None:
            for_next = self._empty(hop.rows_for_next)
            receives.append((self._schedule.at(-1), for_next))
        if hop.home_from is not None:
            for_home = self._empty(self._schedule.rows[self._schedule.rank])
            receives.append((hop.home_from, for_home))
        pending = self._group.exchange(self._primitive, sends, receives)
        self._coming = _Coming(pending, for_next, for_home)

    def home(self) -> Tensors:
        """This rank's own block, with the shares of all ranks."""
        self._land()
        assert self._total is not None, "every block had its step"
        return self._message.unpack((self._total,))

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
