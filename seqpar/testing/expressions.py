"""Masks joined by `&` and `|`, as nested tuples: made by the package, and straight from their definition.

("causal",)   ("window", left, right)   ("documents", bounds)   ("rectangle", rows, cols)
("and", a, b)   ("or", a, b)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqpar import masks
from seqpar.layout import Mask
from seqpar.layout.mask_arguments import Align

Expression = tuple[Any, ...]
MARGIN = (
    8  # positions past the longer sequence, by which an open side is told from one that ends there
)


def made(expression: Expression, align: Align | None = None) -> Mask:
    """The mask that the package makes of an expression."""
    return replace(_made(expression), align=align)


def _made(expression: Expression) -> Mask:
    kind, *rest = expression
    if kind in ("and", "or"):
        left, right = map(_made, rest)
        return left & right if kind == "and" else left | right
    if kind == "rectangle":
        return masks.rectangle(*rest)
    if kind == "window":
        return Mask(window=tuple(rest))
    return Mask(documents=rest[0]) if kind == "documents" else Mask(causal=True)


def visible(
    expression: Expression, num_rows: int, num_cols: int, align: Align | None = None
) -> Tensor:
    """True where a row sees a column, `[num_rows num_cols]`, by what each part of the expression means."""
    apart = apart_by(expression, num_rows, num_cols, align)
    row = torch.arange(num_rows) + max(apart, 0)
    return _seen(expression, row[:, None], torch.arange(num_cols) + max(-apart, 0))


def apart_by(expression: Expression, num_rows: int, num_cols: int, align: Align | None) -> int:
    """How far the first row stands after the first key; nowhere else where all rows see the same."""
    every = torch.arange(max(num_rows, num_cols) + MARGIN)
    seen = _seen(expression, every[:, None], every)
    return num_cols - num_rows if align == "bottom-right" and bool((seen != seen[:1]).any()) else 0


def _seen(expression: Expression, i: Tensor, j: Tensor) -> Tensor:
    kind, *rest = expression
    if kind == "and":
        return _seen(rest[0], i, j) & _seen(rest[1], i, j)
    if kind == "or":
        return _seen(rest[0], i, j) | _seen(rest[1], i, j)
    everywhere = (i >= 0) & (j >= 0)
    if kind == "causal":
        return everywhere & (j <= i)
    if kind == "window":
        left, right = rest
        seen = everywhere if left is None else everywhere & (j >= i - left)
        return seen if right is None else seen & (j <= i + right)
    if kind == "documents":
        bounds = torch.tensor(rest[0])
        of_i, of_j = ((x[..., None] >= bounds).sum(-1) for x in (i, j))
        return of_i == of_j
    (top, bottom), (left, right) = rest
    seen = everywhere & (i >= top) & (j >= left)
    seen = seen if bottom is None else seen & (i < bottom)
    return seen if right is None else seen & (j < right)
