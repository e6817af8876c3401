"""`Region`: a rectangle between two diagonals, of which every mask of ranges is made."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from seqpar_kernels.band import Band

FAR = 1 << 40  # farther than any position: an open side


class Region(NamedTuple):
    """Row i sees column j iff top <= i < bottom, left <= j < right and lower <= j - i <= upper.

    Two regions have a region in common, and what one has and another has not is a few regions more.
    """

    top: int = 0
    bottom: int = FAR
    left: int = 0
    right: int = FAR
    lower: int = -FAR
    upper: int = FAR

    @property
    def columns(self) -> tuple[int, int]:
        """The columns, first and last + 1, that some row sees, if each row sees one."""
        # Of endless rows there is no last one, which would see less than all to the right.
        end = self.right if self.bottom >= FAR else min(self.right, self.bottom + self.upper)
        return max(self.left, self.top + self.lower), end

    def trimmed(self) -> Region | None:
        """The region without rows that see nothing, and columns that nobody sees; `None` of nothing."""
        top, bottom = (
            max(self.top, self.left - self.upper),
            min(self.bottom, self.right - self.lower),
        )
        if self.lower > self.upper or self.left >= self.right or top >= bottom:
            return None
        left, right = self._replace(top=top, bottom=bottom).columns
        return Region(top, bottom, left, right, self.lower, self.upper)

    @property
    def ahead(self) -> int:
        """How far after a row a column is at most that it sees; negative where all are before it."""
        return min(self.upper, self.right - 1 - self.top)

    def within(
        self, row: int, num_rows: int, col: int, num_cols: int, step: int
    ) -> tuple[slice, slice, Band] | None:
        """The part of a block that is inside, and what its rows see there; `None` if there is no part.

        Args:
            row, col: positions of the first row and column of the block; step lies between neighbours.
        """
        top, bottom = indices(row, num_rows, step, self.top, self.bottom)
        left, right = indices(col, num_cols, step, self.left, self.right)
        if top >= bottom or left >= right:
            return None
        band = band_between(self.lower, self.upper, row + top * step, col + left * step, step)
        return slice(top, bottom), slice(left, right), band


def of_rows(regions: Sequence[Region], row: int, last_row: int) -> slice:
    """Those of regions whose rows follow each other that have some of the rows from one to another."""
    first = bisect_right(regions, row, key=attrgetter("bottom"))
    return slice(first, bisect_right(regions, last_row, key=attrgetter("top")))


def band_between(lower: int, upper: int, row: int, col: int, step: int) -> Band:
    """The band that lower <= column - row <= upper is to a block of positions.

    Dividing by the step rounds towards the inside.
    """
    return Band(
        None if lower <= -FAR else -((col - row - lower) // step),
        None if upper >= FAR else (upper + row - col) // step,
    )


def indices(start: int, length: int, step: int, first: int, end: int) -> tuple[int, int]:
    """The indices, first and last + 1, of positions start, start + step, ... from first to end - 1."""
    # Two minus signs make the division round up: the first index that is not before.
    low, high = -((start - first) // step), -((start - end) // step)
    return min(max(0, low), length), min(max(0, high), length)
