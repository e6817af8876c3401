"""Dense attention from global positions: what everything else is judged by, sharing no code with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

LEARNED = ("bias", "relative", "slopes", "sinks")  # in the order of their gradients


@dataclass(frozen=True, eq=False)
class Terms:
    """What an attention score is made of, and where rows and columns are.

    Args:
        slopes, sinks: `[hq]`.
        bias: `[b hq s skv]`, or what broadcasts to it.
        relative: `[b hq 2*reach+1]`, or what broadcasts to it, by column - row.
        dropout: (p, seed).
        row, col: global positions; by default 0, 1, ...
        head: global index of the first head.
    """

    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout: tuple[float, int] | None = None
    row: Tensor | None = None
    col: Tensor | None = None
    head: int = 0
    bias: Tensor | None = None
    relative: Tensor | None = None

    @property
    def learned(self) -> list[Tensor]:
        """What learns, as far as there is any: biases, slopes and sinks."""
        found = (getattr(self, name) for name in LEARNED)
        return [x for x in found if x is not None]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Terms:
        """The same with what learns changed, as far as there is any."""
        there = {name: x for name in LEARNED if (x := getattr(self, name)) is not None}
        changed = {name: change(x) for name, x in there.items()}
        return replace(self, **changed)  # type: ignore[arg-type]


def visible(
    length: int,
    causal: bool,
    window: int | tuple[int | None, int | None] | None,
    documents: Any = None,
    kv_length: int | None = None,
    align: str | None = None,
) -> Tensor:
    """The mask `[s skv]`, True where row i sees column j, straight from the definition.

    Args:
        documents: boundaries; a pair of them where keys are another sequence.
    """
    kv_length = length if kv_length is None else kv_length
    if documents is not None and documents and isinstance(documents[0], tuple):
        seen = torch.zeros(length, kv_length, dtype=torch.bool)
        for (a, b), (c, d) in zip(*(pairwise(bounds) for bounds in documents), strict=True):
            seen[a:b, c:d] = visible(b - a, causal, window, None, d - c, align)
        return seen
    i, j = torch.arange(length)[:, None], torch.arange(kv_length)[None, :]
    if align == "bottom-right":
        i = i + kv_length - length
    seen = torch.ones(length, kv_length, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if isinstance(window, tuple):
        left, right = window
        if left is not None:
            seen &= j >= i - left
        if right is not None:
            seen &= j <= i + right
    elif window is not None:
        seen &= i - j < window
        if not causal:
            seen &= j - i < window
    if documents is not None:
        of = (torch.arange(length)[:, None] >= torch.tensor(documents)).sum(-1)
        seen &= of[:, None] == of[None, :]
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, terms: Terms) -> Tensor:
    """Dense attention `[b s hq vd]` in the precision of its inputs, differentiable by autograd."""
    p = weights(q, k, seen, terms)
    if terms.dropout is not None:
        p = p * kept(p, terms) / (1 - terms.dropout[0])
    return torch.einsum("bhij,bjhd->bihd", p, _per_query_head(v, q))


def weights(q: Tensor, k: Tensor, seen: Tensor, terms: Terms) -> Tensor:
    """The attention matrix `[b hq s s]` before dropout; rows that see nothing are zero."""
    s = scores(q, k, terms)
    anything = seen.any(-1, keepdim=True)
    s = torch.where(seen | ~anything, s, float("-inf"))
    if terms.sinks is None:
        return torch.softmax(s, -1) * anything
    sink = terms.sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
    return torch.softmax(torch.cat((s, sink), -1), -1)[..., :-1] * anything


def scores(q: Tensor, k: Tensor, terms: Terms) -> Tensor:
    """The scores `[b hq s s]`, nothing hidden."""
    s = torch.einsum("bihd,bjhd->bhij", q, _per_query_head(k, q)) * terms.scale
    if terms.softcap is not None:
        s = terms.softcap * torch.tanh(s / terms.softcap)
    if terms.bias is not None:
        s = s + terms.bias.to(s.dtype)
    if terms.relative is not None:
        s = s + terms.relative.to(s.dtype)[..., _from_the_left(s, terms)]
    if terms.slopes is not None:
        s = s - terms.slopes.to(s.dtype)[:, None, None] * distance(s, terms).to(s.dtype)
    return s


def distance(s: Tensor, terms: Terms) -> Tensor:
    """|row - column| `[s s]` in positions."""
    row, col = _positions(s, terms)
    return (row[:, None] - col[None, :]).abs()


def _from_the_left(s: Tensor, terms: Terms) -> Tensor:
    """Which entry of `relative` each score takes, `[s skv]`."""
    assert terms.relative is not None
    reach = (terms.relative.shape[-1] - 1) // 2
    row, col = _positions(s, terms)
    return torch.clip(col[None, :] - row[:, None], -reach, reach) + reach


def kept(p: Tensor, terms: Terms) -> Tensor:
    """Which weights `[b hq s s]` dropout keeps: Philox 4x32-7 of (column, row, head, batch)."""
    assert terms.dropout is not None
    chance, seed = terms.dropout
    row, col = (x.long() for x in _positions(p, terms))
    batch, head = torch.arange(p.shape[0]), torch.arange(p.shape[1])
    c = torch.broadcast_tensors(
        col, row[:, None], head[:, None, None] + terms.head, batch[:, None, None, None]
    )
    low = 0xFFFFFFFF
    keys = [seed & low, seed >> 32]
    for _ in range(7):
        # int64 wraps round at 2**64, so the masks find both words of an unsigned product.
        one, two = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            ((two >> 32) & low) ^ c[1] ^ keys[0], two & low,
            ((one >> 32) & low) ^ c[3] ^ keys[1], one & low,
        ]  # fmt: skip
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return c[0] >= round(chance * 2**32)


def with_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seen: Tensor, terms: Terms
) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv) of dense attention and the gradients of what is learned, by autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    terms = terms.changed(lambda x: x.detach().clone().requires_grad_())
    with torch.enable_grad():
        out = attention(leaves[0], leaves[1], leaves[2], seen, terms)
    return out.detach(), *torch.autograd.grad(out, [*leaves, *terms.learned], dout)


def magnitudes(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, p: Tensor, terms: Terms
) -> tuple[float, ...]:
    """The largest sum of absolute terms behind any element of each result, for weights p.

    Rounding errors scale with these and not with results, which may cancel to nothing.
    """
    if q.shape[1] == 0 or k.shape[1] == 0:
        return (0.0,) * (4 + len(terms.learned))
    q_a, k_a, v_a, dout_a = (
        q.abs(),
        _per_query_head(k, q).abs(),
        _per_query_head(v, q).abs(),
        dout.abs(),
    )
    factor = 1 if terms.dropout is None else 1 / (1 - terms.dropout[0])
    v_a = v_a * factor
    dp = torch.einsum("bihd,bjhd->bhij", dout_a, v_a)
    delta = (p * dp).sum(-1, keepdim=True)
    ds = p * (dp + delta)
    dx = ds * abs(terms.scale)
    group = q.shape[2] // k.shape[2]
    sums = [
        torch.einsum("bhij,bjhd->bihd", p, v_a),
        torch.einsum("bhij,bjhd->bihd", dx, k_a),
        torch.einsum("bhij,bihd->bjhd", dx, q_a).unflatten(2, (-1, group)).sum(3),
        torch.einsum("bhij,bihd->bjhd", p * factor, dout_a).unflatten(2, (-1, group)).sum(3),
    ]
    if terms.bias is not None:
        sums.append(ds.sum_to_size(_padded(terms.bias, 4)))
    if terms.relative is not None:
        whole = torch.zeros(*ds.shape[:2], terms.relative.shape[-1], dtype=ds.dtype)
        whole.index_add_(2, _from_the_left(ds, terms).flatten(), ds.flatten(2))
        sums.append(whole.sum_to_size(_padded(terms.relative, 3)))
    if terms.slopes is not None:
        sums.append(torch.einsum("bhij,ij->h", ds, distance(ds, terms).to(ds.dtype)))
    if terms.sinks is not None:
        sums.append(delta.sum((0, 2, 3)))
    return tuple(float(x.max()) for x in sums)


def _positions(s: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    row = torch.arange(s.shape[-2]) if terms.row is None else terms.row
    col = torch.arange(s.shape[-1]) if terms.col is None else terms.col
    return row, col


def _padded(x: Tensor, ndim: int) -> tuple[int, ...]:
    return (1,) * (ndim - x.ndim) + tuple(x.shape)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[2] // x.shape[2], dim=2)
