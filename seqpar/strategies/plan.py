"""`Plan`: everything an attention call needs besides its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from seqpar.comm import Group
from seqpar.layout import Layout, Mask, joined_tiles, tiles
from seqpar_kernels import Block, Documents, Dropout, Implementation, Score

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
        implementation: of the block math; `None` chooses by device, dtype and what is asked.
        dropout: of the attention weights; the same seed on every rank, another for every layer and step.
    """

    group: Group
    layout: Layout
    mask: Mask = Mask()
    score: Score = Score()
    strategy: Strategy = "ring"
    implementation: Implementation | None = None
    dropout: Dropout | None = None

    @property
    def drops(self) -> Dropout | None:
        """The dropout, unless its p is zero."""
        return self.dropout if self.dropout is not None and self.dropout.p > 0 else None

    @property
    def packed(self) -> Documents | None:
        """The documents of the mask, as kernels take them."""
        return None if self.mask.documents is None else Documents(tuple(self.mask.documents))

    def blocks(self, owner: int, score: Score, head: int) -> Iterator[tuple[slice, slice, Block]]:
        """(local rows, the owner's rows, block) where this rank's queries see the owner's keys.

        Args:
            score: of the heads at hand, resolved.
            head: which of all query heads is the first at hand.
        """
        met = tiles(self.layout, self.mask, self.group.rank, owner)
        drops, packed = self.drops, self.packed
        needs_positions = score.alibi_slopes is not None or drops or packed
        for t in met if needs_positions else joined_tiles(met):
            block = Block(t.band, score, t.row, t.col, t.step, head, drops, packed)
            yield t.rows, t.cols, block
