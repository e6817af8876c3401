"""Softmax of scores that are stored, in pieces: a row's columns may lie on several devices.

Forward: `add_sums_` over the columns here, combine the maxima and sums of all, then `weights`. Backward:
`add_dot_` of weights and their gradients, sum over all, then `score_gradient`. On CUDA these are Triton
kernels, elsewhere torch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.choice import Implementation, fuses
from seqpar_kernels.finite import may_hold_poison
from seqpar_kernels.partial import without_autocast
from seqpar_kernels.score import Score


def add_sums_(
    s: Float[Tensor, "a b c j"],
    m: Float[Tensor, "a b c"],
    l: Float[Tensor, "a b c"],
    *,
    implementation: Implementation | None = None,
) -> None:
    """Continues the running maximum m and sum l of exp(s - m) with more scores of the rows, in place.

    -inf is a hidden score. A row that has seen nothing holds m = -inf, l = 0.
    """
    if s.shape[-1] == 0:
        return
    if fuses(s, implementation):
        from seqpar_kernels import triton_softmax

        triton_softmax.add_sums_(s, m, l)
        return
    top = torch.maximum(m, s.amax(-1).to(m.dtype))
    origin = torch.where(top == -torch.inf, 0.0, top)
    l.mul_(torch.exp(m - origin)).add_(torch.exp(s.to(m.dtype) - origin.unsqueeze(-1)).sum(-1))
    m.copy_(top)


def join_(
    score: Score,
    s: Float[Tensor, "a hq c j"],
    m: Float[Tensor, "a hq c"],
    l: Float[Tensor, "a hq c"],
    *,
    implementation: Implementation | None = None,
) -> None:
    """Continues the maximum and sum of each row with the terms that join it once, in place."""
    joined = score.joined()
    if joined is not None:
        columns = joined.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
        add_sums_(columns, m, l, implementation=implementation)


def weights(
    s: Float[Tensor, "a b c j"],
    m: Float[Tensor, "a b c"],
    l: Float[Tensor, "a b c"],
    dtype: torch.dtype,
    *,
    implementation: Implementation | None = None,
) -> Float[Tensor, "a b c j"]:
    """exp(s - m) / l in `dtype`, with m and l over *all* columns; rows that see nothing get zeros."""
    if fuses(s, implementation):
        from seqpar_kernels import triton_softmax

        return triton_softmax.weights(s, m, l, dtype)
    empty = l == 0
    m, l = m.masked_fill(empty, 0.0), l.masked_fill(empty, 1.0)
    p = (torch.exp(s.to(m.dtype) - m.unsqueeze(-1)) / l.unsqueeze(-1)).to(dtype)
    # A row that is NaN is so where it sees a key, and only there.
    return p.masked_fill_(s == -torch.inf, 0.0) if may_hold_poison(m, l) else p


def add_dot_(
    x: Float[Tensor, "a b c w"],
    y: Float[Tensor, "a b c w"],
    into: Float[Tensor, "a b c"],
    *,
    implementation: Implementation | None = None,
) -> None:
    """Adds the sums of x * y over the last dim to `into`, in its type: delta, or a part of it."""
    if fuses(x, implementation):
        from seqpar_kernels import triton_softmax

        triton_softmax.add_dot_(x, y, into)
        return
    with without_autocast(x.device):
        into.add_(torch.einsum("abcw,abcw->abc", x.to(into.dtype), y.to(into.dtype)))


def score_gradient(
    p: Float[Tensor, "a b c j"],
    dp: Float[Tensor, "a b c j"],
    delta: Float[Tensor, "a b c"],
    *,
    implementation: Implementation | None = None,
) -> Float[Tensor, "a b c j"]:
    """Ds = p (dp - delta), with delta over *all* columns; in the type of dp. 0 where p is 0 and dp finite."""
    if fuses(p, implementation):
        from seqpar_kernels import triton_softmax

        return triton_softmax.score_gradient(p, dp, delta)
    ds = (p.to(delta.dtype) * (dp.to(delta.dtype) - delta.unsqueeze(-1))).to(dp.dtype)
    return ds.masked_fill_(p == 0, 0.0) if may_hold_poison(delta) else ds
