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
from seqpar_kernels.block import Block, Rows
from seqpar_kernels.partial import Partial

TILE = 64


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block. Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), 3.1."""
    num_groups = k.shape[2]
    for rows, cols, tile in _tiles(block, q, k):
        q_t, k_t, v_t = (_widen(x) for x in (q[:, rows], k[:, cols], v[:, cols]))
        visible = _visible(tile, q_t, k_t)
        s, _ = _scores(q_t, k_t, tile)
        s = s.masked_fill(~visible, float("-inf"))
        m_t = s.amax(-1)
        some = m_t > float("-inf")
        p = torch.exp(s - torch.where(some, m_t, 0.0).unsqueeze(-1))
        acc = torch.einsum("bgrij,bjgd->bgrid", p * _kept(tile, p), v_t)
        part = into[rows]
        # A row of the tile may see nothing: its m is -inf, and exp(-inf - -inf) would be NaN.
        m_t = _rows_first(torch.where(some, m_t, torch.finfo(m_t.dtype).min))
        l_t = _rows_first(p.sum(-1))
        part.merge_(rearrange(acc, "b g r i d -> b i (g r) d", g=num_groups), m_t, l_t)
        part.m.masked_fill_(part.l == 0, float("-inf"))


def backward(
    of: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: tuple[Tensor, Tensor, Tensor],
    dslopes: Float[Tensor, "b i hq"] | None,
) -> None:
    """Adds the block's gradients to dq, dk, dv (and dslopes), given lse and delta of the whole rows."""
    dq, dk, dv = into
    num_groups, scale = k.shape[2], block.score.factor
    for rows, cols, tile in _tiles(block, of.q, k):
        q_t, k_t, v_t, dout_t = (
            _widen(x) for x in (of.q[:, rows], k[:, cols], v[:, cols], of.dout[:, rows])
        )
        visible = _visible(tile, q_t, k_t)
        s, slope_of_cap = _scores(q_t, k_t, tile)
        dout_t = rearrange(dout_t, "b i (g r) d -> b i g r d", g=num_groups)
        lse_t, delta_t = (
            rearrange(x[:, rows], "b i (g r) -> b g r i 1", g=num_groups)
            for x in (of.lse, of.delta)
        )
        p = torch.where(visible, torch.exp(s - lse_t), 0.0)
        kept = _kept(tile, p)
        dp = torch.einsum("bigrd,bjgd->bgrij", dout_t, v_t) * kept
        ds = p * (dp - delta_t)
        if dslopes is not None:
            dslopes[:, rows] -= _rows_first((ds * _distance(tile, ds)).sum(-1))
        dx = ds * slope_of_cap * scale
        q_t = rearrange(q_t, "b i (g r) d -> b i g r d", g=num_groups)
        dq_t = torch.einsum("bgrij,bjgd->bigrd", dx, k_t)
        dq[:, rows] += rearrange(dq_t, "b i g r d -> b i (g r) d")
        dk[:, cols] += torch.einsum("bgrij,bigrd->bjgd", dx, q_t)
        dv[:, cols] += torch.einsum("bgrij,bigrd->bjgd", p * kept, dout_t)


def _tiles(block: Block, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Block]]:
    """(rows, cols, tile) of the tiles in which some row is inside the band."""
    num_rows, num_cols = q.shape[1], k.shape[1]
    for row in range(0, num_rows, TILE):
        for col in reversed(range(0, num_cols, TILE)):
            tile = block.at(row, col)
            height, width = min(TILE, num_rows - row), min(TILE, num_cols - col)
            if tile.band.count(height, width):
                yield slice(row, row + height), slice(col, col + width), tile


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


def _visible(tile: Block, q: Tensor, k: Tensor) -> Bool[Tensor, "i j"]:
    """What the rows of a tile see: the band, inside their own documents."""
    num_rows, num_cols = q.shape[1], k.shape[1]
    visible = visibility(tile.band, num_rows, num_cols, q.device)
    limits = tile.row_limits(num_rows, num_cols, q.device)
    if limits is not None:
        col = torch.arange(num_cols, device=q.device)
        visible &= (col >= limits[:, :1]) & (col < limits[:, 1:])
    return visible


def _scores(q: Tensor, k: Tensor, tile: Block) -> tuple[Float[Tensor, "b g r i j"], Tensor | float]:
    """The scores, nothing hidden, and their derivative by scale * q.k."""
    q = rearrange(q, "b i (g r) d -> b i g r d", g=k.shape[2])
    s = torch.einsum("bigrd,bjgd->bgrij", q, k) * tile.score.factor
    slope_of_cap: Tensor | float = 1.0
    if tile.score.softcap is not None:
        bent = torch.tanh(s / tile.score.softcap)
        s, slope_of_cap = bent * tile.score.softcap, 1 - bent.square()
    if tile.score.alibi_slopes is not None:
        slopes = tile.score.alibi_slopes.to(s.dtype)
        slopes = rearrange(slopes, "(g r) -> g r 1 1", g=s.shape[1])
        s = s - slopes * _distance(tile, s)
    return s, slope_of_cap


def _distance(tile: Block, s: Float[Tensor, "b g r i j"]) -> Float[Tensor, "i j"]:
    """How many positions lie between each row and each column."""
    row, col = _positions(tile, s)
    return (row - col).abs().to(s.dtype)


def _kept(tile: Block, p: Float[Tensor, "b g r i j"]) -> Tensor | float:
    """What dropout multiplies the weights by."""
    if tile.dropout is None:
        return 1.0
    batch = torch.arange(p.shape[0], device=p.device)[:, None, None, None, None]
    head = torch.arange(p.shape[1] * p.shape[2], device=p.device) + tile.head
    keeps = tile.dropout.keeps(batch, head.view(*p.shape[1:3], 1, 1), *_positions(tile, p))
    return keeps.to(p.dtype) * tile.dropout.factor


def _positions(tile: Block, s: Float[Tensor, "b g r i j"]) -> tuple[Tensor, Tensor]:
    """Global positions of the rows `[i 1]` and of the columns `[j]`."""
    num_rows, num_cols = s.shape[-2:]
    row = tile.row + tile.step * torch.arange(num_rows, device=s.device)
    col = tile.col + tile.step * torch.arange(num_cols, device=s.device)
    return row[:, None], col


def _rows_first(x: Tensor) -> Float[Tensor, "b i hq"]:
    return rearrange(x, "b g r i -> b i (g r)")


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
