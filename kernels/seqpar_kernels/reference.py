"""The readable implementation: tile by tile in torch, in a fixed order, float64 capable.

Query tiles are taken upwards and, for each, key tiles downwards, so that dq adds its terms in
descending and dk, dv in ascending order of position, whatever block the tiles belong to.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.partial import Partial

TILE = 64


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    band: Band,
    scale: float,
    into: Partial,
) -> None:
    """Continues `into` with the block. Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), 3.1."""
    num_groups = k.shape[2]
    for rows, cols, visible in _tiles(band, q, k):
        q_t, k_t, v_t = (_widen(x) for x in (q[:, rows], k[:, cols], v[:, cols]))
        s = _scores(q_t, k_t, visible, scale)
        m_t = s.amax(-1)
        some = m_t > float("-inf")
        p = torch.exp(s - torch.where(some, m_t, 0.0).unsqueeze(-1))
        acc = torch.einsum("bgrij,bjgd->bgrid", p, v_t)
        part = into[rows]
        # A row of the tile may see nothing: its m is -inf, and exp(-inf - -inf) would be NaN.
        m_t = _rows_first(torch.where(some, m_t, torch.finfo(m_t.dtype).min))
        l_t = _rows_first(p.sum(-1))
        part.merge_(rearrange(acc, "b g r i d -> b i (g r) d", g=num_groups), m_t, l_t)
        part.m.masked_fill_(part.l == 0, float("-inf"))


def backward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    dout: Float[Tensor, "b i hq vd"],
    lse: Float[Tensor, "b i hq"],
    delta: Float[Tensor, "b i hq"],
    band: Band,
    scale: float,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Adds the block's gradients to dq, dk, dv, given the lse and delta of the whole rows."""
    dq, dk, dv = into
    num_groups = k.shape[2]
    for rows, cols, visible in _tiles(band, q, k):
        q_t, k_t, v_t, dout_t = (
            _widen(x) for x in (q[:, rows], k[:, cols], v[:, cols], dout[:, rows])
        )
        dout_t = rearrange(dout_t, "b i (g r) d -> b i g r d", g=num_groups)
        lse_t, delta_t = (
            rearrange(x[:, rows], "b i (g r) -> b g r i 1", g=num_groups) for x in (lse, delta)
        )
        s = _scores(q_t, k_t, visible, scale)
        p = torch.where(visible, torch.exp(s - lse_t), 0.0)
        dp = torch.einsum("bigrd,bjgd->bgrij", dout_t, v_t)
        ds = p * (dp - delta_t) * scale
        q_t = rearrange(q_t, "b i (g r) d -> b i g r d", g=num_groups)
        dq_t = torch.einsum("bgrij,bjgd->bigrd", ds, k_t)
        dq[:, rows] += rearrange(dq_t, "b i g r d -> b i (g r) d")
        dk[:, cols] += torch.einsum("bgrij,bigrd->bjgd", ds, q_t)
        dv[:, cols] += torch.einsum("bgrij,bigrd->bjgd", p, dout_t)


def _tiles(band: Band, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Bool[Tensor, "i j"]]]:
    """(rows, cols, visible) of the tiles in which some row sees some column."""
    num_rows, num_cols = q.shape[1], k.shape[1]
    for row in range(0, num_rows, TILE):
        for col in reversed(range(0, num_cols, TILE)):
            tile = band.at(row, col)
            height, width = min(TILE, num_rows - row), min(TILE, num_cols - col)
            if tile.count(height, width):
                visible = visibility(tile, height, width, q.device)
                yield slice(row, row + height), slice(col, col + width), visible


def visibility(
    band: Band, num_rows: int, num_cols: int, device: torch.device
) -> Bool[Tensor, "i j"]:
    """The band written out as a dense mask, True where a row sees a column."""
    offset = torch.arange(num_cols, device=device) - torch.arange(num_rows, device=device)[:, None]
    visible = torch.ones_like(offset, dtype=torch.bool)
    if band.lower is not None:
        visible &= offset >= band.lower
    if band.upper is not None:
        visible &= offset <= band.upper
    return visible


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float) -> Float[Tensor, "b g r i j"]:
    q = rearrange(q, "b i (g r) d -> b i g r d", g=k.shape[2])
    s = torch.einsum("bigrd,bjgd->bgrij", q, k) * scale
    return s.masked_fill(~visible, float("-inf"))


def _rows_first(x: Tensor) -> Float[Tensor, "b i hq"]:
    return rearrange(x, "b g r i -> b i (g r)")


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
