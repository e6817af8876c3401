"""`Block`: where a block of scores lies and what is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from jaxtyping import Int
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.score import Score
from seqpar_kernels.terms import Place, Term


@dataclass(frozen=True, eq=False)
class Block:
    """A block of scores. Its row i is position `row + i * step`, its column j `col + j * step`.

    Positions matter to some terms only; without those a band says all.

    Args:
        band: what the rows see of the columns.
        score: of the block's query heads, with the scale resolved.
        head: the place of the block's first query head among those of the whole attention.
        terms: what is done besides the score, such as dropout and documents of the whole sequence.
    """

    band: Band
    score: Score
    row: int = 0
    col: int = 0
    step: int = 1
    head: int = 0
    terms: tuple[Term, ...] = ()

    @cached_property
    def acting(self) -> tuple[Term, ...]:
        """All terms that do something, in the order in which they are applied."""
        return tuple(term for term in (*self.score.terms, *self.terms) if term.acts)

    @property
    def is_plain(self) -> bool:
        """Whether a visible score is scale * q.k and nothing else."""
        return not any(term.changes_scores for term in self.acting)

    @property
    def hides(self) -> bool:
        """Whether anything but the band hides scores."""
        return any(term.hides for term in self.acting)

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
        return Place(row, self.col + self.step * torch.arange(j, device=device), self.head)

    def row_limits(self, i: int, j: int, device: torch.device) -> Int[Tensor, "i 2"] | None:
        """Per row, the range of columns that it sees, but for the band; `None` if that is all."""
        return self._limits(self.row, i, self.col, j, device)

    def col_limits(self, i: int, j: int, device: torch.device) -> Int[Tensor, "j 2"] | None:
        """Per column, the range of rows that see it, but for the band; `None` if that is all."""
        return self._limits(self.col, j, self.row, i, device)

    def parts(self, num_rows: int, num_cols: int) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of parts that terms let see each other, with all that is visible in one of them."""
        parts = [(slice(0, num_rows), slice(0, num_cols))]
        for term in self.acting:
            if term.hides:
                parts = [cut for part in parts for cut in self._cut(term, *part)]
        yield from parts

    def _cut(self, term: Term, rows: slice, cols: slice) -> Iterator[tuple[slice, slice]]:
        first, left, step = rows.start, cols.start, self.step
        row, col = self.row + first * step, self.col + left * step
        for r, c in term.parts(row, rows.stop - first, col, cols.stop - left, step):
            yield slice(first + r.start, first + r.stop), slice(left + c.start, left + c.stop)

    def _limits(
        self, start: int, length: int, others: int, num_others: int, device: torch.device
    ) -> Int[Tensor, "length 2"] | None:
        where = start, length, others, num_others, self.step, device
        limits = [term.limits(*where) for term in self.acting if term.hides]
        return reduce(_both, limits) if limits else None


def _both(a: Int[Tensor, "n 2"], b: Int[Tensor, "n 2"]) -> Int[Tensor, "n 2"]:
    """The ranges that two ranges have in common; of none the first end is past the last."""
    return torch.stack((torch.maximum(a[:, 0], b[:, 0]), torch.minimum(a[:, 1], b[:, 1])), dim=1)
