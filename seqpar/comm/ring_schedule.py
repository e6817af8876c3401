"""Who has which block in a ring at which step, and where blocks and their sums go: tables, made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

Wants = Callable[[int, int], bool]  # (visitor, owner): whether the visitor wants the owner's block


class Hop(NamedTuple):
    """A step of one rank: ranks that blocks are sent to and come from; `None` where nothing is.

    Args:
        owner: of the block that is due here.
        to_next: the neighbour that is sent the block at hand.
        far: the rank that is sent this rank's own.
        source: of the block of the next step.
        rows: of that block.
    """

    owner: int
    to_next: int | None
    far: int | None
    source: int | None
    rows: int


class SumHop(NamedTuple):
    """A step of one rank: what happens to sums; `None` where nothing does.

    Args:
        rows: of the sum that this rank adds to.
        to: where that goes. This rank's own stays, then.
        rows_for_next: of a sum that comes to be continued here.
        home_from: where the sum of this rank's own block comes from.
    """

    rows: int | None
    to: int | None
    rows_for_next: int | None
    home_from: int | None


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

    @cached_property
    def hops(self) -> tuple[Hop, ...]:
        """What happens to blocks in each step."""
        # docs/design.md: schedules are made once
        return tuple(self._hop(step) for step in range(self.size))

    def _hop(self, step: int) -> Hop:
        owner, coming, source = self.owner_at(step), self.owner_at(step + 1), None
        if step + 1 == self.size:
            return Hop(owner, None, None, None, 0)
        if self.visits(self.rank, coming):
            source = self.at(-1) if self.follows(self.rank, coming) else coming
        is_here = owner == self.rank or self.visits(self.rank, owner)
        to_next = self.at(1) if is_here and self.visits(self.at(1), owner) else None
        ahead = self.at(step + 1)
        # Where the neighbour before it does not want this rank's block, it is sent straight from here.
        goes_far = step > 0 and self.visits(ahead, self.rank) and not self.follows(ahead, self.rank)
        far = ahead if goes_far else None
        return Hop(owner, to_next, far, source, self.rows[coming])

    def sum_hops(self, *, in_order: bool) -> tuple[SumHop, ...]:
        """What happens to sums in each step; see `RingSum`."""
        return self._sums_in_order if in_order else self._sums

    @cached_property
    def _sums(self) -> tuple[SumHop, ...]:
        return tuple(self._sum_hop(step, in_order=False) for step in range(self.size))

    @cached_property
    def _sums_in_order(self) -> tuple[SumHop, ...]:
        return tuple(self._sum_hop(step, in_order=True) for step in range(self.size))

    def _sum_hop(self, step: int, *, in_order: bool) -> SumHop:
        owner, coming, rank = self.owner_at(step), self.owner_at(step + 1), self.rank
        goes_on = self.visits(self.at(1), owner)
        rows = self.rows[owner] if owner == rank or self.visits(rank, owner) else None
        # docs/design.md: the ring's own gradients stay at home
        stays = owner == rank and not (in_order and goes_on)
        to = None if rows is None or stays else self.at(1) if goes_on else owner
        is_continued = self.visits(rank, coming) and (
            # An owner hands its sum on only in order; otherwise its share stays at home.
            in_order if self.at(-1) == coming else self.follows(rank, coming)
        )
        # The sum for this rank's block is now at `last`, and comes home unless the next rank wants it too.
        last = self.at(step)
        comes_home = (
            step > 0 and self.visits(last, rank) and not self.visits(self.at(step + 1), rank)
        )
        return SumHop(
            rows, to, self.rows[coming] if is_continued else None, last if comes_home else None
        )

    @cached_property
    def is_awaited(self) -> bool:
        """Whether anybody else wants this rank's block."""
        return any(self.visits(rank, self.rank) for rank in range(self.size))

    @cached_property
    def last_far(self) -> int:
        """The last step after which this rank's block is sent far."""
        return max((step for step, hop in enumerate(self.hops) if hop.far is not None), default=0)

    @cached_property
    def most_rows(self) -> int:
        """The rows of the largest block."""
        return max(self.rows)
