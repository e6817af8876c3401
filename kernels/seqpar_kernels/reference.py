"""The readable implementation: tile by tile in torch, in a fixed order, float64 capable.

Query tiles are taken upwards and, for each, key tiles downwards, so that dq adds its terms in
descending and dk, dv in ascending order of position, whatever block the tiles belong to. The query
heads of a group add to dk, dv in the order of heads, inside their tile.

Every product is of whole tiles of one query head: what lies past the end of a block is zero and hidden,
and what is one wide gets a second column of zeros, since products with a vector are added in an order that
depends on how many heads there are. A head's bits then depend neither on how many heads are with it nor,
where a sequence is cut between tiles, on the cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.block import Block
from seqpar_kernels.partial import Partial
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.terms import MaskMod, Place, Sums

TILE = 64
NARROWEST = 2


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block, in its type. Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691)."""
    group, dtype = q.shape[2] // k.shape[2], into.acc.dtype
    for rows, tiles in _walk(block, q, k):
        running = into[rows]
        q_t, acc = _load(q, rows, dtype), _load(running.acc, slice(None), dtype)
        m, l = (_load_numbers(x, slice(None), dtype) for x in (running.m, running.l))
        for cols, tile in tiles:
            k_t, v_t = (_load(x, cols, dtype, group) for x in (k, v))
            s, _, _ = _scores(q_t, k_t, tile, rows, cols)
            s = s.masked_fill(~_visible(tile, rows, cols, s), float("-inf"))
            top = torch.maximum(m, s.amax(-1, keepdim=True))
            # A row may have seen nothing: exp(-inf - -inf) would be NaN.
            origin = torch.where(top == float("-inf"), 0.0, top)
            shrink, p = torch.exp(m - origin), torch.exp(s - origin)
            acc = acc * shrink + (p * _kept(tile, p)) @ v_t
            l = l * shrink + p.sum(-1, keepdim=True)
            m = top
        _store(acc, running.acc)
        _store(m, running.m.unsqueeze(-1))
        _store(l, running.l.unsqueeze(-1))


def backward(
    of: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: RunningGradients,
    learned: Learned,
    sums: Sums = (),
) -> None:
    """Adds the block's gradients to those wanted of dq, dk, dv and learned tensors, in the type of lse."""
    dq, dk, dv = into
    group, dtype, scale = of.q.shape[2] // k.shape[2], of.lse.dtype, block.score.factor
    for rows, tiles in _walk(block, of.q, k):
        q_t, dout_t = (_load(x, rows, dtype) for x in (of.q, of.dout))
        lse_t, delta_t = (_load_numbers(x, rows, dtype) for x in (of.lse, of.delta))
        for cols, tile in tiles:
            k_t, v_t = (_load(x, cols, dtype, group) for x in (k, v))
            s, bend, before = _scores(q_t, k_t, tile, rows, cols)
            p = torch.exp(s - lse_t)
            hidden = ~_visible(tile, rows, cols, s)
            p = p.masked_fill(hidden, 0.0)
            if isinstance(bend, Tensor):  # whatever hidden scores are
                bend = bend.masked_fill(hidden, 0.0)
            kept = _kept(tile, p)
            ds = p * (dout_t @ v_t.mT * kept - delta_t)
            dx = ds * bend * scale
            for term in tile.acting:
                if term.name in learned:
                    share = term.gradient(ds, _place(tile, ds.device))
                    _add(share.unsqueeze(-1), learned[term.name][:, rows].unsqueeze(-1))
                if term.has_sums and sums:
                    part = (..., slice(_length(rows)), slice(_length(cols)))
                    place = tile.place(_length(rows), _length(cols), ds.device)
                    term.add_gradients_(ds[part], before, place, sums)
            if dq is not None:
                _add(dx @ k_t, dq[:, rows])
            if dk is not None and dv is not None:
                _add(dx.mT @ q_t, dk[:, cols])
                _add((p * kept).mT @ dout_t, dv[:, cols])


def _walk(block: Block, q: Tensor, k: Tensor) -> Iterator[tuple[slice, list[tuple[slice, Block]]]]:
    """The rows of each tile, with (cols, tile) of those in which some row sees anything.

    In a dry run one tile tells of all, since each takes the same memory.
    """
    num_rows, num_cols = q.shape[1], k.shape[1]
    for row in range(0, num_rows, TILE):
        rows = slice(row, min(row + TILE, num_rows))
        tiles = []
        for col in reversed(range(0, num_cols, TILE)):
            cols, tile = slice(col, min(col + TILE, num_cols)), block.at(row, col)
            if tile.count(_length(rows), _length(cols)):
                tiles.append((cols, tile))
        if tiles and q.device.type == "meta":
            yield rows, tiles[:1]
            return
        if tiles:
            yield rows, tiles


def _load(
    x: Float[Tensor, "b s h w"], where: slice, dtype: torch.dtype, group: int = 1
) -> Float[Tensor, "b hq 64 wide"]:
    """A whole tile, its heads first, each repeated for its group. What lies past the end is zero."""
    x = x[:, where].transpose(1, 2)
    b, h, length, width = x.shape
    # docs/design.md: nothing is one wide
    tile = x.new_zeros(b, h, group, TILE, max(width, NARROWEST), dtype=dtype)
    tile[..., :length, :width] = x.unsqueeze(2)
    return tile.flatten(1, 2)


def _load_numbers(
    x: Float[Tensor, "b s h"], where: slice, dtype: torch.dtype
) -> Float[Tensor, "b h 64 1"]:
    """A number for each row of a whole tile."""
    return _load(x.unsqueeze(-1), where, dtype)[..., :1]


def _store(tile: Float[Tensor, "b h 64 wide"], to: Float[Tensor, "b s h w"]) -> None:
    to.copy_(tile[:, :, : to.shape[1], : to.shape[3]].transpose(1, 2))


def _add(tile: Float[Tensor, "b hq 64 wide"], to: Float[Tensor, "b s h w"]) -> None:
    """Adds the query heads of every group to their head, one after another."""
    by_group = tile[:, :, : to.shape[1], : to.shape[3]].unflatten(1, (to.shape[2], -1))
    for head in by_group.unbind(2):
        to += head.transpose(1, 2)


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


def _visible(
    tile: Block, rows: slice, cols: slice, s: Float[Tensor, "b hq 64 64"]
) -> Bool[Tensor, "*b 64 64"]:
    """What the rows of a tile see: the band, inside their ranges and inside the block."""
    num_rows, num_cols, device = _length(rows), _length(cols), s.device
    visible = visibility(tile.band, TILE, TILE, device)
    visible[num_rows:] = False
    visible[:, num_cols:] = False
    for term in tile.acting:
        if isinstance(term, MaskMod):
            inside = s[..., :num_rows, :num_cols]
            shown = term.shows(inside, tile.place(num_rows, num_cols, device))
            whole = torch.zeros_like(s, dtype=torch.bool)
            whole[..., :num_rows, :num_cols] = shown
            visible = visible & whole
        elif term.hides:
            visible = visible & term.visible(_place(tile, device))
    return visible


def _scores(
    q: Float[Tensor, "b hq 64 d"],
    k: Float[Tensor, "b hq 64 d"],
    tile: Block,
    rows: slice,
    cols: slice,
) -> tuple[Float[Tensor, "b hq 64 64"], Tensor | float, Float[Tensor, "b hq i j"]]:
    """The scores, nothing hidden, their derivative by scale * q.k, and what a `score_mod` was given."""
    s = (q @ k.mT) * tile.score.factor
    bend: Tensor | float = 1.0
    before = s
    for term in tile.acting:
        if term.changes_scores and term.asks_each:
            inside = (..., slice(_length(rows)), slice(_length(cols)))
            before = s[inside].clone()
            bent = torch.ones_like(s)
            changed = term.scores_(s[inside], tile.place(_length(rows), _length(cols), s.device))
            assert changed is not None, "it says how it bends"
            bent[inside] = changed
            bend = bend * bent
        elif term.changes_scores:
            slope = term.tile_scores_(s, _place(tile, s.device))
            bend = bend if slope is None else bend * slope
    return s, bend, before


def _kept(tile: Block, p: Float[Tensor, "b hq 64 64"]) -> Tensor | float:
    """What terms multiply the weights by."""
    kept: Tensor | float = 1.0
    for term in tile.acting:
        if term.drops:
            batch = torch.arange(p.shape[0], device=p.device)[:, None, None, None] + tile.batch
            head = torch.arange(p.shape[1], device=p.device)[:, None, None] + tile.head
            kept = kept * term.multiplier(batch, head, _place(tile, p.device), p.dtype)
    return kept


def _place(tile: Block, device: torch.device) -> Place:
    """Where a whole tile lies, also past the end of its block."""
    return tile.place(TILE, TILE, device)


def _length(part: slice) -> int:
    return part.stop - part.start
