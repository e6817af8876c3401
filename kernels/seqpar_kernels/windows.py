"""The windows that FlashAttention-2 wants in place of a band.

Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from seqpar_kernels.band import Band
from seqpar_kernels.block import Block
from seqpar_kernels.rectangles import Rectangle, cut


@dataclass(frozen=True)
class Window:
    """Rows and columns of a block under one window; `None` leaves that side open.

    Row i of nq sees column j of nk iff `i + nk - nq - left <= j <= i + nk - nq + right`: the window
    hangs at the bottom right. Every row sees at least one column, and left and right are below nk.
    """

    rows: slice
    cols: slice
    left: int | None
    right: int | None


def windows(block: Block, num_rows: int, num_cols: int) -> Iterator[Window]:
    """Disjoint windows that together hold exactly the visible scores of the block.

    One for each part of the block, such as a document; three at most where it has more rows than columns.
    """
    if block.ranges is not None:
        return map(_window, cut(block, num_rows, num_cols, _pieces))
    return iter(_of_band(block.band, num_rows, num_cols))


@lru_cache(1024)
def _of_band(band: Band, num_rows: int, num_cols: int) -> tuple[Window, ...]:
    """The windows of a band: a ring asks for the same ones in every step."""
    return tuple(map(_window, _pieces(band, num_rows, num_cols)))


def _window(part: Rectangle) -> Window:
    """The window of a piece, which is one."""
    nq, nk = part.rows.stop - part.rows.start, part.cols.stop - part.cols.start
    lower, upper = part.band.lower, part.band.upper
    return Window(
        part.rows,
        part.cols,
        left=None if lower is None or lower <= 1 - nq else nk - nq - lower,
        right=None if upper is None or upper >= nk - 1 else upper + nq - nk,
    )


def _pieces(band: Band, num_rows: int, num_cols: int) -> Iterator[Rectangle]:
    """The band less the rows and columns outside it, in parts that are one window each.

    Of nq rows and nk columns that are left, row 0 sees column 0 and row nq - 1 sees column nk - 1.
    The latter reads nq - 1 + lower <= nk - 1 <= nq - 1 + upper: left and right are not negative.

    The op takes a side of nk or more for an open one, and one open side beside a closed one for nk (as
    found in version 2.8 and in torch 2.13). Neither matters while nq <= nk: a bound that hides something
    has lower > 1 - nq or upper < nk - 1, so that left < nk - 1 or right < nq - 1, and row 0 with nk to
    the right still sees all. A taller block is cut where `upper` stops and where `lower` begins
    to bind. If no row is free of both, nk - upper > -lower, and right <= upper - lower < nk as it is.
    """
    seen = band.rows(num_rows, num_cols)
    if not seen:
        return
    cols = range(
        band.columns(seen[0], num_cols).start,
        band.columns(seen[-1], num_cols).stop,
    )
    band = band.at(seen.start, cols.start)
    for first, stop in pairwise((0, *_cuts(band, len(seen), len(cols)), len(seen))):
        if first < stop:
            yield Rectangle(
                slice(seen.start + first, seen.start + stop),
                slice(cols.start, cols.stop),
                band.at(first, 0),
            )


def _cuts(band: Band, nq: int, nk: int) -> tuple[int, ...]:
    """Where to cut the rows: the first that `upper` leaves alone, and the first that `lower` binds."""
    if nq <= nk:
        return ()
    free = 0 if band.upper is None else max(0, nk - band.upper)
    bound = nq if band.lower is None else min(nq, -band.lower)
    return (free, bound) if free <= bound else ()
