"""`Tile`s: the rectangles of scores where the rows of one rank meet the rows of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from seqpar.layout.mask import Mask
from seqpar.layout.shards import Layout
from seqpar.layout.spans import Span
from seqpar.layout.visible import sees, visible_count
from seqpar_kernels import Band


@dataclass(frozen=True)
class Tile:
    """Local query rows, the key rows of the owner they meet, and what they see of them.

    `row` and `col` are the positions of the first of each, `step` lies between neighbours.
    """

    rows: slice
    cols: slice
    band: Band
    row: int
    col: int
    step: int

    @property
    def part(spans: Sequence[Span], rows: slice) -> tuple[Span, ...]:
    """The positions of some of the rows that spans hold."""
    parts = []
    for at, span in held(spans):
        first, stop = max(rows.start, at.start), min(rows.stop, at.stop)
        if first < stop:
            start = span.start + (first - at.start) * span.step
            parts.append(Span(start, stop - first, span.step))
    return tuple(parts)


def work(layout: Layout, mask: Mask) -> tuple[int, ...]:
    """Visible scores per rank when each attends its own rows to all keys: the ring's load balance."""
    everything = [span for spans in layout.spans for span in spans]
    return tuple(
        sum(visible_count(mask, row, col) for row in spans for col in everything)
        for spans in layout.spans
    )
