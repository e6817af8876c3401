"""Dense attention from global positions: what everything else is judged by, sharing no code with it."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(length: int, causal: bool, window: int | None) -> Tensor:
    """The mask `[s s]`, True where row i sees column j, straight from the definition."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
    seen = torch.ones(length, length, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= i - j < window
        if not causal:
            seen &= j - i < window
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Dense attention `[b s hq vd]` in the precision of its inputs, differentiable by autograd."""
    p = weights(q, k, seen, scale)
    return torch.einsum("bhij,bjhd->bihd", p, _per_query_head(v, q))


def weights(q: Tensor, k: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The attention matrix `[b hq s s]`."""
    return torch.softmax(scores(q, k, scale).masked_fill(~seen, float("-inf")), dim=-1)


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scale * q.k `[b hq s s]`, nothing hidden."""
    return torch.einsum("bihd,bjhd->bhij", q, _per_query_head(k, q)) * scale


def with_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, dq, dk, dv) of dense attention, by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = attention(leaves[0], leaves[1], leaves[2], seen, scale)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return out.detach(), dq, dk, dv


def magnitudes(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, p: Tensor, scale: float
) -> tuple[float, float, float, float]:
    """The largest sum of absolute terms behind any element of (out, dq, dk, dv), for weights p.

    Rounding errors scale with these and not with results, which may cancel to nothing.
    """
    if q.shape[1] == 0:
        return 0.0, 0.0, 0.0, 0.0
    q_a, k_a, v_a, dout_a = (
        q.abs(),
        _per_query_head(k, q).abs(),
        _per_query_head(v, q).abs(),
        dout.abs(),
    )
    dp = torch.einsum("bihd,bjhd->bhij", dout_a, v_a)
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * abs(scale)
    group = q.shape[2] // k.shape[2]
    terms = (
        torch.einsum("bhij,bjhd->bihd", p, v_a),
        torch.einsum("bhij,bjhd->bihd", ds, k_a),
        torch.einsum("bhij,bihd->bjhd", ds, q_a).unflatten(2, (-1, group)).sum(3),
        torch.einsum("bhij,bihd->bjhd", p, dout_a).unflatten(2, (-1, group)).sum(3),
    )
    out, dq, dk, dv = (float(x.max()) for x in terms)
    return out, dq, dk, dv


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)
