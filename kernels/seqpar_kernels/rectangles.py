"""Cuts a band into rectangles that kernels with no mask but `is_causal` can do.

Under the upper diagonal that is one full and one causal rectangle, whatever the block. Only the
lower diagonal of a window needs a mask, and there it is at most `EDGE` columns wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from seqpar_kernels.band import Band
from seqpar_kernels.block import Block

EDGE = 256  # rows per strip under a window: the dense mask is EDGE x (EDGE - 1); not tuned


@dataclass(frozen=True)
class Rectangle:
    """A part of a block. Every one of its rows sees at least one of its columns.

    `band` is `FULL`, `CAUSAL` (row i sees columns 0 ... i, counted inside the rectangle; rows past
    the last column see all), or any other band, which takes a mask.
    """

    rows: slice
    cols: slice
    band: Band


FULL = Band()
CAUSAL = Band(upper=0)


def cut(
    block: Block, num_rows: int, num_cols: int, how: Callable[[Band, int, int], Iterator[Rectangle]]
) -> Iterator[Rectangle]:
    """`how` applied to each part of the block whose rows and columns terms let see each other."""
    for rows, cols, band in block.parts(num_rows, num_cols):
        for part in how(band, rows.stop - rows.start, cols.stop - cols.start):
            yield Rectangle(_moved(part.rows, rows.start), _moved(part.cols, cols.start), part.band)


def rectangles(band: Band, num_rows: int, num_cols: int) -> Iterator[Rectangle]:
    """Disjoint rectangles that together hold exactly the visible scores of the block."""
    visible = band.rows(num_rows, num_cols)
    if band.lower is None or band.is_full(num_rows, num_cols):
        yield from _under(band.upper, visible, range(num_cols))
        return
    for start in range(visible.start, visible.stop, EDGE):
        strip = range(start, min(start + EDGE, visible.stop))
        # Columns before `inner` are cut off by the lower diagonal for some row of the strip.
        inner = min(max(0, strip[-1] + band.lower), num_cols)
        outer = max(0, strip[0] + band.lower)
        edge_rows = range(strip[0], min(strip.stop, inner - band.lower))
        if edge_rows and outer < inner:
            yield Rectangle(_slice(edge_rows), slice(outer, inner), band.at(strip[0], outer))
        yield from _under(band.upper, strip, range(inner, num_cols))


def strips(band: Band, num_rows: int, num_cols: int, width: int) -> Iterator[Rectangle]:
    """The same scores, in strips of about equal width, no more than `width` columns each."""
    num_strips = -(-num_cols // width)
    even = -(-num_cols // num_strips)
    for left in range(0, num_cols, even):
        for part in rectangles(band.at(0, left), num_rows, min(even, num_cols - left)):
            yield Rectangle(part.rows, _moved(part.cols, left), part.band)


def _under(upper: int | None, rows: range, cols: range) -> Iterator[Rectangle]:
    """The part of rows x cols with j <= i + upper, as at most one full and one causal rectangle."""
    if upper is None:
        first, causal = rows.start, cols.stop
    else:
        first = max(rows.start, cols.start - upper)
        causal = min(cols.stop, first + upper)
    rows = range(first, rows.stop)
    if not rows:
        return
    if cols.start < causal:
        yield Rectangle(_slice(rows), slice(cols.start, causal), FULL)
    if causal < cols.stop:
        yield Rectangle(_slice(rows), slice(causal, cols.stop), CAUSAL)


def _moved(s: slice, by: int) -> slice:
    return slice(s.start + by, s.stop + by)


def _slice(r: range) -> slice:
    return slice(r.start, r.stop)
