"""`seen`: blocks, for the kernels, of what the last rows of a sequence see of the keys that a rank holds.

Unlike two shards of one layout, queries lie side by side and keys may lie in steps; and nearly all keys
are seen by every query, so that hardly any block needs a mask.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from seqpar.layout import Mask, Span, held
from seqpar_kernels import Block, Score

Met = tuple[slice, slice, Block]


def continued(mask: Mask) -> Mask:
    """The mask of a sequence that grows: its last document is open."""
    bounds = mask.bounds[:-1]
    # Queries stand where they are in the sequence, however many keys there are.
    return replace(mask, documents=bounds if len(bounds) > 1 else None, align=None, shift=(0, 0))


@dataclass
class Seen:
    """The columns that every row sees, for any reason, and blocks of those that only some may see.

    Columns that all see need no mask and no positions, so that a kernel may take rows in any order.
    """

    by_all: list[slice] = field(default_factory=list)
    by_some: list[Met] = field(default_factory=list)


def seen(rows: Span, spans: tuple[Span, ...], mask: Mask, score: Score) -> Seen:
    """Finds what consecutive positions see of the keys of some spans, held one span after the other.

    Args:
        rows: of step 1, at least one.
        mask: `continued`.
        score: resolved.
    """
    found = Seen()
    some, every = _reach(rows, mask)
    for at, span in held(spans):
        cols, inside = _cut(at, span, some)
        if inside.length == 0:
            continue
        if score.needs_positions or _cut(at, span, every)[1] != inside:
            found.by_some += _apart(rows, cols, inside, mask, score)
        elif found.by_all and found.by_all[-1].stop == cols.start:
            found.by_all[-1] = slice(found.by_all[-1].start, cols.stop)
        else:
            found.by_all.append(cols)
    return found


def _apart(rows: Span, cols: slice, span: Span, mask: Mask, score: Score) -> Iterator[Met]:
    """Yields a block for each progression of the queries; these are as many as the step of the keys."""
    for first in range(min(span.step, rows.length)):
        progression = slice(first, rows.length, span.step)
        start, num = rows.start + first, len(range(first, rows.length, span.step))
        band = mask.band(Span(start, num, span.step), span)
        block = Block(band, score, start, span.start, span.step, terms=mask.terms)
        yield progression, cols, block


def _reach(rows: Span, mask: Mask) -> tuple[range, range]:
    """The positions that some of the rows see, and those that all of them see."""
    first, last = rows.start, rows.start + rows.length - 1
    (first_doc, first_end), (last_doc, last_end) = (_document(p, mask) for p in (first, last))
    # The band of one position with itself is that of any, told of columns relative to the row.
    band = mask.band(Span(0, 1), Span(0, 1))
    if band.lower is not None:
        first_doc, last_doc = max(first_doc, first + band.lower), max(last_doc, last + band.lower)
    if band.upper is not None:
        ahead = band.upper + 1
        first_end, last_end = min(first_end, first + ahead), min(last_end, last + ahead)
    return range(first_doc, last_end), range(last_doc, first_end)


def _document(position: int, mask: Mask) -> tuple[int, int]:
    """The document of a position: its first position, and its last + 1."""
    bounds = mask.bounds
    n = bisect_right(bounds, position)
    # The last document is open, so its end lies beyond all positions.
    return bounds[n - 1], bounds[n] if n < len(bounds) else 2**62


def _cut(at: slice, span: Span, within: range) -> tuple[slice, Span]:
    """The rows, and the positions, of a span that are in a range."""
    first, end = (-((span.start - p) // span.step) for p in (within.start, within.stop))
    first, end = max(0, first), min(span.length, end)
    if first >= end:
        return slice(at.start, at.start), Span(span.start, 0, span.step)
    start = span.start + first * span.step
    return slice(at.start + first, at.start + end), Span(start, end - first, span.step)
