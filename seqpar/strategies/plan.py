"""`Plan`: everything an attention call needs besides its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from seqpar.comm import Group
from seqpar.layout import Layout, Mask, Tile, tiles
from seqpar_kernels import Implementation, Score

Strategy = Literal["ring", "ulysses"]
STRATEGY_NAMES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True, eq=False)
class Plan:
    """A frozen description of sharded attention.

    Making one checks nothing and sends nothing, so that a wrong plan on one rank cannot leave the
    others waiting: the call that uses it checks it together with its tensors, on all ranks.

    Args:
        group: the ranks that share the sequence.
        layout: which of them holds which positions.
        mask: what a position may see.
        score: what happens to q.k before the softmax.
        strategy: how the ranks work together.
        implementation: of the block math; `None` chooses by device and dtype.
    """

    group: Group
    layout: Layout
    mask: Mask = Mask()
    score: Score = Score()
    strategy: Strategy = "ring"
    implementation: Implementation | None = None

    def tiles(self, owner: int) -> tuple[Tile, ...]:
        """The tiles in which this rank's queries see the owner's keys."""
        return tiles(self.layout, self.mask, self.group.rank, owner)
