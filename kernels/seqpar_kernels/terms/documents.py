"""`Documents`: packed sequences, each position of which sees its own document only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seqpar_kernels.terms.term import Place, Term
from seqpar_kernels.transfer import on_device


@dataclass(frozen=True)
class Documents(Term):
    """Boundaries 0 = b0 <= b1 <= ... <= bn: document n holds positions b(n) to b(n+1) - 1.

    Two equal boundaries are an empty document. Positions from the last boundary on are one more.

    Raises:
        ValueError: the boundaries do not start at 0 or go down.
        TypeError: they are not integers.
    """

    bounds: tuple[int, ...]

    name, words = "documents", "documents"
    needs_positions = hides = True

    def __post_init__(self) -> None:
        if not all(isinstance(b, int) and not isinstance(b, bool) for b in self.bounds):
            raise TypeError(f"documents must be integer boundaries, got {self.bounds!r}")
        if not self.bounds or self.bounds[0] != 0 or any(a > b for a, b in pairwise(self.bounds)):
            raise ValueError(
                "documents must be boundaries from 0 upwards, the cumulative lengths, "
                f"got {self.bounds!r}"
            )

    def visible(self, place: Place) -> Bool[Tensor, "i j"]:
        """True where a row and a column are of one document."""
        borders = on_device(self.bounds[1:], place.row.device)
        row, col = (torch.searchsorted(borders, x, right=True) for x in (place.row, place.col))
        return row[:, None] == col

    def parts(
        self, row: int, num_rows: int, col: int, num_cols: int, step: int
    ) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of each document that has some of both."""
        cols = dict(self.runs(col, num_cols, step))
        for document, rows in self.runs(row, num_rows, step):
            if document in cols:
                yield rows, cols[document]

    def limits(
        self, start: int, length: int, others: int, num_others: int, step: int, device: torch.device
    ) -> Int[Tensor, "length 2"]:
        """Per position, the range of others in the same document."""
        ends = on_device((*self.bounds[1:], torch.iinfo(torch.int64).max >> 1), device)
        starts = on_device(self.bounds, device)
        positions = start + step * torch.arange(length, device=device)
        document = torch.searchsorted(ends, positions, right=True)
        both = torch.stack((starts[document], ends[document]), dim=1)
        return (-((others - both) // step)).clamp_(0, num_others).int()

    def runs(self, start: int, length: int, step: int) -> Iterator[tuple[int, slice]]:
        """(document, indices) of each document that has some of the positions start, start + step, ..."""
        for n, (first, end) in enumerate(pairwise((*self.bounds, start + length * step))):
            a, b = (min(max(0, -((start - x) // step)), length) for x in (first, end))
            if a < b:
                yield n, slice(a, b)
