"""`seen`: blocks, for the kernels, of what the last rows of a sequence see of the keys that a rank holds.

Unlike two shards of one layout, queries lie side by side and keys may lie in steps; and nearly all keys
are seen by every query, so that hardly any block needs a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from seqpar.layout import Mask, Span, held
from seqpar_kernels import Block, Layer, Score
from seqpar_kernels.region import indices

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
    for layer in mask.layers:
        some, every = _reach(rows, layer)
        for at, span in held(spans):
            cols, inside = _cut(at, span, some)
            if inside.length == 0:
                continue
            if score.needs_positions or _cut(at, span, every)[1] != inside:
                found.by_some += _apart(rows, cols, inside, layer, score)
            elif found.by_all and found.by_all[-1].stop == cols.start:
                found.by_all[-1] = slice(found.by_all[-1].start, cols.stop)
            else:
                found.by_all.append(cols)
    return found


def _apart(rows: Span, cols: slice, span: Span, layer: Layer, score: Score) -> Iterator[Met]:
    """Yields a block for each progression of the queries; these are as many as the step of the keys."""
    for first in range(min(span.step, rows.length)):
        progression = slice(first, rows.length, span.step)
        start = rows.start + first
        band = layer.band(start, span.start, span.step)
        block = Block(band, score, start, span.start, span.step, terms=layer.terms)
        yield progression, cols, block


def _reach(rows: Span, layer: Layer) -> tuple[range, range]:
    """The positions that some of the rows see, and those that all of them see."""
    first, end, inner, inner_end, num = [], [], [], [], 0
    for region in layer.of_rows(rows.start, rows.start + rows.length - 1):
        top, bottom = max(region.top, rows.start), min(region.bottom, rows.start + rows.length)
        if top < bottom:
            last, num = bottom - 1, num + bottom - top
            first.append(max(region.left, top + region.lower))
            inner.append(max(region.left, last + region.lower))
            inner_end.append(min(region.right, top + region.upper + 1))
            end.append(min(region.right, last + region.upper + 1))
    # Rows of no region see nothing.
    every = range(max(inner), min(inner_end)) if num == rows.length else range(0)
    return range(min(first, default=0), max(end, default=0)), every


def _cut(at: slice, span: Span, within: range) -> tuple[slice, Span]:
    """The rows, and the positions, of a span that are in a range."""
    first, end = indices(span.start, span.length, span.step, within.start, within.stop)
    if first >= end:
        return slice(at.start, at.start), Span(span.start, 0, span.step)
    start = span.start + first * span.step
    return slice(at.start + first, at.start + end), Span(start, end - first, span.step)
