"""Visibility between two spans: how many of their scores a mask shows, packed documents included."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from seqpar.layout.mask import Mask
from seqpar.layout.spans import Span


def visible_count(mask: Mask, rows: Span, cols: Span) -> int:
    """Counts the scores of `rows` and `cols`, two spans of the same step, that `mask` shows.

    Looks only at documents between the later of the two first positions and the earlier of the last.
    """
    return sum(_counts(mask, rows, cols))


def sees(mask: Mask, rows: Span, cols: Span) -> bool:
    """Whether `mask` shows any score of `rows` and `cols`; stops at the first document that does."""
    return any(_counts(mask, rows, cols))


def _counts(mask: Mask, rows: Span, cols: Span) -> Iterator[int]:
    """Counts the visible scores in each document that both spans have a part in."""
    if rows.length == 0 or cols.length == 0:
        return
    band = mask.band(rows, cols)
    for start, stop in _shared_documents(mask.bounds, rows, cols):
        top, bottom = _indices(rows, start, stop)
        left, right = _indices(cols, start, stop)
        if top < bottom and left < right:
            yield band.at(top, left).count(bottom - top, right - left)


def _shared_documents(
    documents: Sequence[int], rows: Span, cols: Span
) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of every document that both spans may have a part in."""
    first = bisect_right(documents, max(rows.start, cols.start)) - 1
    last = bisect_right(documents, min(rows.positions[-1], cols.positions[-1])) - 1
    if first > last:
        return iter(())
    # A growing sequence has no boundary behind its last document, and `end` stands in for it.
    end = max(rows.positions.stop, cols.positions.stop)
    return pairwise((*documents[first : last + 2], end)[: last - first + 2])


def _indices(span: Span, start: int, stop: int) -> tuple[int, int]:
    """The indices, first and last + 1, of the span's positions from `start` to `stop - 1`."""
    # Two minus signs make the division round up: the first index that is not before p.
    first, end = (-((span.start - p) // span.step) for p in (start, stop))
    return min(max(0, first), span.length), min(max(0, end), span.length)
