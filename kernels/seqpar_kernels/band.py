"""`Band`: the pair of diagonals between which a block of scores is visible.

Causal masks, windows and their combination, seen from any two arithmetic progressions of positions
with the same step, are all of this form, so kernels need to know no other mask.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """Row i sees column j iff `i + lower <= j <= i + upper`; `None` leaves that side open.

    With 4 rows and 5 columns, `Band(lower=-1, upper=1)` is::

        1 1 0 0 0
        1 1 1 0 0
        0 1 1 1 0
        0 0 1 1 1
    """

    lower: int | None = None
    upper: int | None = None

    def __and__(self, other: Band) -> Band:
        """What both bands show."""
        lowers = [x for x in (self.lower, other.lower) if x is not None]
        uppers = [x for x in (self.upper, other.upper) if x is not None]
        return Band(max(lowers, default=None), min(uppers, default=None))

    def at(self, row: int, col: int) -> Band:
        """The same band as seen by the block whose corner is (row, col)."""
        shift = row - col
        return Band(
            None if self.lower is None else self.lower + shift,
            None if self.upper is None else self.upper + shift,
        )

    def columns(self, row: int, num_cols: int) -> range:
        """The columns that one row sees."""
        first = 0 if self.lower is None else max(0, row + self.lower)
        last = num_cols - 1 if self.upper is None else min(num_cols - 1, row + self.upper)
        return range(first, max(first, last + 1))

    def rows(self, num_rows: int, num_cols: int) -> range:
        """The rows that see at least one of the columns: always one contiguous range."""
        if num_cols == 0 or self._is_hollow():
            return range(0)
        first = 0 if self.upper is None else max(0, -self.upper)
        last = num_rows if self.lower is None else min(num_rows, num_cols - self.lower)
        return range(first, max(first, last))

    def count(self, num_rows: int, num_cols: int) -> int:
        """How many scores are visible: the work of the block."""
        if self._is_hollow():
            return 0
        below_upper = (
            num_rows * num_cols if self.upper is None else _below(self.upper, num_rows, num_cols)
        )
        below_lower = 0 if self.lower is None else _below(self.lower - 1, num_rows, num_cols)
        return below_upper - below_lower

    def is_full(self, num_rows: int, num_cols: int) -> bool:
        """Whether every row sees every column, so that no mask is needed."""
        if num_rows == 0 or num_cols == 0:
            return True
        upper_is_idle = self.upper is None or self.upper >= num_cols - 1
        lower_is_idle = self.lower is None or self.lower <= 1 - num_rows
        return upper_is_idle and lower_is_idle

    def _is_hollow(self) -> bool:
        return self.lower is not None and self.upper is not None and self.lower > self.upper


def _below(upper: int, num_rows: int, num_cols: int) -> int:
    """Number of (i, j) with j <= i + upper: a clamped arithmetic series."""
    first = min(max(0, -upper), num_rows)  # rows before this one see nothing
    full = min(max(first, num_cols - upper - 1), num_rows)  # rows from here on see every column
    rising = (upper + 1 + first + upper + full) * (full - first) // 2
    return rising + (num_rows - full) * num_cols
