"""Visibility between two spans: whether a mask shows any of their scores, and how many."""

from __future__ import annotations

from seqpar.layout.mask import Mask
from seqpar.layout.spans import Span


def visible_count(mask: Mask, rows: Span, cols: Span) -> int:
    """Counts the scores of `rows` and `cols`, two spans of the same step, that `mask` shows."""
    return sum(layer.count(*mask.place(rows, cols)) for layer in mask.layers)


def sees(mask: Mask, rows: Span, cols: Span) -> bool:
    """Whether `mask` shows any score of `rows` and `cols`; stops at the first region that does."""
    return any(layer.sees(*mask.place(rows, cols)) for layer in mask.layers)
