"""What the last rows of a sequence see of the keys that a rank holds, as blocks for the kernels.

Unlike two shards of one layout, queries lie side by side and keys may lie in steps; and nearly all keys
are seen by every query, so that hardly any block needs a mask.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace

from seqpar.layout import Mask, Span, held
from seqpar_kernels import Band, Block, Documents, Score

Met = tuple[slice, slice, Block]


def continued(mask: Mask) -> Mask:
    """The mask of a sequence that grows: its last document is open."""
    bounds = mask.bounds[:-1]
    return replace(mask, documents=bounds if len(bounds) > 1 else None)


def packed(mask: Mask) -> Documents | None:
    """The documents of a mask, as kernels take them."""
    return None if mask.documents is None else Documents(tuple(mask.documents))


def blocks(rows: Span, spans: tuple[Span, ...], mask: Mask, score: Score) -> Iterator[Met]:
    """(rows, columns, block) where some consecutive positions see the keys of some spans.

    Args:
        rows: of step 1.
        mask: `continued`.
        score: resolved.
    """
    some, every = _seen(rows, mask)
    needs_positions = score.alibi_slopes is not None
    whole = slice(0, rows.length)
    joined = slice(0, 0)
    for at, span in held(spans):
        cols, seen = _cut(at, span, some)
        if seen.length == 0:
            continue
        if needs_positions or _cut(at, span, every)[1] != seen:
            yield from _apart(rows, cols, seen, mask, score)
        elif joined.stop == cols.start:
            joined = slice(joined.start, cols.stop)
        else:
            yield whole, joined, Block(Band(), score)
            joined = cols
    yield whole, joined, Block(Band(), score)


def _apart(rows: Span, cols: slice, seen: Span, mask: Mask, score: Score) -> Iterator[Met]:
    """Blocks of the queries in as many progressions as make the step of the keys."""
    for first in range(min(seen.step, rows.length)):
        every = slice(first, rows.length, seen.step)
        start, num = rows.start + first, len(range(first, rows.length, seen.step))
        band = mask.band(Span(start, num, seen.step), seen)
        block = Block(band, score, start, seen.start, seen.step, documents=packed(mask))
        yield every, cols, block


def _seen(rows: Span, mask: Mask) -> tuple[range, range]:
    """The positions that some of the rows see, and those that all of them see."""
    first, last = rows.start, rows.start + rows.length - 1
    (first_doc, first_end), (last_doc, last_end) = (_document(p, mask) for p in (first, last))
    if mask.window is not None:
        first_doc = max(first_doc, first - mask.window + 1)
        last_doc = max(last_doc, last - mask.window + 1)
    ahead = 1 if mask.causal else mask.window
    if ahead is not None:
        first_end, last_end = min(first_end, first + ahead), min(last_end, last + ahead)
    return range(first_doc, last_end), range(last_doc, first_end)


def _document(position: int, mask: Mask) -> tuple[int, int]:
    """First position and last + 1 of the document of a position."""
    bounds = mask.bounds
    n = bisect_right(bounds, position)
    return bounds[n - 1], bounds[n] if n < len(bounds) else 2**62


def _cut(at: slice, span: Span, seen: range) -> tuple[slice, Span]:
    """The rows, and the positions, of a span that are in a range."""
    first, end = (-((span.start - p) // span.step) for p in (seen.start, seen.stop))
    first, end = max(0, first), min(span.length, end)
    if first >= end:
        return slice(at.start, at.start), Span(span.start, 0, span.step)
    start = span.start + first * span.step
    return slice(at.start + first, at.start + end), Span(start, end - first, span.step)
