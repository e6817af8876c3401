"""`Block`: where a block of scores lies and what is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.score import Score
from seqpar_kernels.terms import Place, Ranges, Term
from seqpar_kernels.terms.ranges import Part, counts, parts_of


@dataclass(frozen=True, eq=False)
class Block:
    """A block of scores. Its row i is position `row + i * step`, its column j `col + j * step`.

    Positions matter to some terms only; without those a band says all.

    Args:
        band: what the rows see of the columns.
        score: of the block's query heads, with the scale resolved.
        head: the place of the block's first query head among those of the whole attention.
        batch: that of its first batch entry.
        terms: what is done besides the score, such as dropout and the ranges of a mask.
    """

    band: Band
    score: Score
    row: int = 0
    col: int = 0
    step: int = 1
    head: int = 0
    batch: int = 0
    terms: tuple[Term, ...] = ()

    @cached_property
    def acting(self) -> tuple[Term, ...]:
        """All terms that do something, in the order in which they are applied."""
        return tuple(term for term in (*self.score.terms, *self.terms) if term.acts)

    @property
    def is_plain(self) -> bool:
        """Whether a visible score is scale * q.k and nothing else."""
        return not any(term.changes_scores for term in self.acting)

    @cached_property
    def ranges(self) -> Ranges | None:
        """What hides scores besides the band."""
        hiding = [term for term in self.acting if isinstance(term, Ranges)]
        assert len(hiding) <= 1, "what two ranges have in common is one"
        return hiding[0] if hiding else None

    def at(self, row: int, col: int) -> Block:
        """The block whose corner is (row, col) of this one."""
        return replace(
            self,
            band=self.band.at(row, col),
            row=self.row + row * self.step,
            col=self.col + col * self.step,
        )

    def place(self, i: int, j: int, device: torch.device) -> Place:
        """The positions of the first rows and columns."""
        row = self.row + self.step * torch.arange(i, device=device)
        col = self.col + self.step * torch.arange(j, device=device)
        return Place(row, col, self.head, self.batch)

    def row_limits(self, i: int, j: int, device: torch.device) -> Int[Tensor, "i 2"] | None:
        """Per row, the range of columns that it sees, but for the band; `None` if that is all."""
        if self.ranges is None:
            return None
        return self.ranges.limits(self.row, i, self.col, j, self.step, device)

    def col_limits(self, i: int, j: int, device: torch.device) -> Int[Tensor, "j 2"] | None:
        """Per column, the range of rows that see it, but for the band; `None` if that is all."""
        if self.ranges is None:
            return None
        return self.ranges.by_columns.limits(self.col, j, self.row, i, self.step, device)

    def parts(self, num_rows: int, num_cols: int) -> Iterator[Part]:
        """(rows, columns, band) of parts that hold all that is visible, none of it twice."""
        place = self.row, num_rows, self.col, num_cols, self.step
        return parts_of(self.band, self.ranges, *place)

    def count(self, num_rows: int, num_cols: int) -> int:
        """How many scores are visible: the work of the block."""
        return sum(counts(self.parts(num_rows, num_cols)))
