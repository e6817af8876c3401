"""Whether what a model returned twice is the same but for rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Rows = dict[str, Tensor]  # what a model returned for one sequence, by name: `[rows ...]`


def rows_of(output: Mapping[str, Any], sequence: int) -> Rows:
    """The tensors that a model returned for one sequence of its batch."""
    return {name: x[sequence] for name, x in output.items() if isinstance(x, Tensor)}


def difference(expected: Rows, got: Rows, start: int = 0) -> tuple[str, float] | None:
    """The first of a model's outputs that is another from some row on, and how far it is off."""
    pairs = ((name, x[start:], got[name][start:]) for name, x in expected.items())
    others = ((name, float((x - y).abs().max())) for name, x, y in pairs if not same_rows(x, y))
    return next(others, None)


def same_rows(x: Float[Tensor, "r *d"], y: Float[Tensor, "r *d"]) -> bool:
    """Whether at least half of the rows are the same but for rounding.

    Half, since a token that is routed to another expert by a rounding error is another token. Models of
    float64 have steps in float32, such as the softmax of eager attention.
    """
    if x.is_floating_point():
        step = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
        off = ~((x - y).abs() <= step**0.5 * x.abs().max())  # NaN is not the same
    else:
        off = (x != y).any().expand(len(x), 1)  # one number that is another counts as all of them
    return int(off.reshape(len(x), -1).any(1).sum()) * 2 <= len(x)
