"""The forward kernel: one tile of query rows walks the key tiles it sees, downwards.

It continues (acc, m, l) from where the last block left them and never normalises, so cutting the keys
into blocks at tile borders changes no bit. Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqpar_kernels.triton_terms import (
    LOG2E,
    cleaned,
    dot,
    dot_add,
    draws,
    edges_hold,
    load_tile,
    loaded,
    meets,
    places,
    program,
    scores,
    sees,
    unit,
    visits,
    weighed,
)


@triton.jit
def _step(
    acc, m, l, met, q, K, V, t, i, first, end, batch, head, values,
    k_stride, v_stride, num_cols, row, col, step, scale,
    D: tl.constexpr, VD: tl.constexpr, PADDED_D: tl.constexpr, PADDED_VD: tl.constexpr,
    COLS: tl.constexpr, SCORES: tl.constexpr, DRAWS: tl.constexpr, WEIGHS: tl.constexpr,
    PLAIN: tl.constexpr, MASKED: tl.constexpr, CLEANS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(acc, m, l) continued with key tile t, and `met` if CLEANS: see `forward_kernel`."""
    j = t * COLS + tl.arange(0, COLS)
    k = load_tile(K, t * COLS, k_stride, num_cols, COLS, D, PADDED_D, MASKED, WIDE)
    x = dot(q, tl.trans(k))
    place = i[:, None], j[None, :], row, col, step, batch, head[:, None]
    s, _ = scores(x, place, values, scale, SCORES, PLAIN)
    visible = (j[None, :] >= first[:, None]) & (j[None, :] < end[:, None])
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1) * unit(scale, PLAIN))
    # A row that has seen nothing yet: exp(-inf - -inf) would be NaN.
    origin = tl.where(top == float("-inf"), 0.0, top) if MASKED else top
    p = tl.exp2(s * (unit(scale, PLAIN) * LOG2E) - (origin * LOG2E)[:, None])
    shrink = tl.exp2((m - origin) * LOG2E)
    l = l * shrink + tl.sum(p, 1)
    p = weighed(p, draws(place, values, DRAWS), values, WEIGHS)
    v = load_tile(V, t * COLS, v_stride, num_cols, COLS, VD, PADDED_VD, MASKED, WIDE)
    if CLEANS:
        met, v = tl.maximum(met, meets(visible, v)), cleaned(v)
    acc = dot_add(p, v, acc * shrink[:, None])
    return acc, top, l, met


@triton.jit(do_not_specialize=[
    "num_rows", "num_cols", "heads", "all_packs", "num_tiles", "section",
    "lower", "upper", "row", "col", "step", "head0", "batch0", "whole_0", "whole_1",
])  # fmt: skip
def forward_kernel(
    Q, K, V, ACC, M, L, LIMITS, FLAGS, VALUES,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, acc_b, acc_s, acc_h, m_b, m_s, m_h,
    num_rows, num_cols, heads, all_packs, num_tiles, section,
    lower, upper, row, col, step, head0, batch0, scale, whole_0, whole_1,
    GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, VD: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_VD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    LOADS: tl.constexpr, SCORES: tl.constexpr, DRAWS: tl.constexpr, WEIGHS: tl.constexpr,
    WHOLE: tl.constexpr, SOURCES: tl.constexpr, PLAIN: tl.constexpr,
    LIMITED: tl.constexpr, REVERSED: tl.constexpr, WIDE: tl.constexpr,
    FROM: tl.constexpr, TO: tl.constexpr, BEGINS: tl.constexpr,
    GUARDED: tl.constexpr, CLEANS: tl.constexpr,
):  # fmt: skip
    """Q `[b i hq d]`, k `[b j hkv d]`, v `[b j hkv vd]`; acc `[b i hq vd]`, m, l `[b i hq]` float32.

    A program takes PACK query heads of one kv head, ROWS / PACK rows of each. LIMITS `[i 2]` int32 are
    the columns that terms show a row, or a dummy. VALUES and the functions, LOADS to WEIGHS, are those of
    terms, see `triton_terms`. FROM and TO leave out the phases that this block does not have. Where the sums
    BEGIN, they hold nothing, and are written.

    A launch that CLEANS runs the programs that find something not finite in a tile that some row sees
    in part: they put zeros in its place and NaN in what sees it. It marks them in FLAGS, and one that is
    GUARDED leaves them out.
    """
    tile, pack = program(num_tiles, all_packs, section, REVERSED)
    batch, h = pack // (heads // PACK), (pack % (heads // PACK)) * PACK
    b64, h64, g64 = batch.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
    index = tile * ROWS + tl.arange(0, ROWS)
    inside = index < num_rows * PACK
    index = tl.minimum(index, num_rows * PACK - 1)
    i, head = index // PACK, h + index % PACK
    first, end = sees(i, lower, upper, num_cols, LIMITS, LIMITED)
    start, inner, inner_stop, stop = visits(first, end, COLS, FROM == 1)
    K += b64 * k_b + g64 * k_h
    V += b64 * v_b + g64 * v_h
    if CLEANS:
        flag = edges_hold(
            V, v_s, num_cols, start, inner, inner_stop, stop, COLS, VD, PADDED_VD, WIDE
        )
        tl.store(FLAGS + tl.program_id(0), flag)
        inside = inside & (flag > 0)
        inner, inner_stop, stop = start, start, tl.where(flag > 0, stop, start)
    elif GUARDED:
        inside = inside & (tl.load(FLAGS + tl.program_id(0)) == 0)
    values = loaded(VALUES, (whole_0, whole_1), head[:, None], LOADS, WHOLE)

    d, e = tl.arange(0, PADDED_D), tl.arange(0, PADDED_VD)
    q_at = Q + b64 * q_b + h64 * q_h + places(index, q_s, q_h, PACK)[:, None] + d[None, :]
    q = tl.load(q_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    m_at = b64 * m_b + h64 * m_h + places(index, m_s, m_h, PACK)
    if BEGINS:
        m, l = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    else:
        m = tl.load(M + m_at, mask=inside, other=float("-inf"))
        l = tl.load(L + m_at, mask=inside, other=0.0)
    acc_at = ACC + b64 * acc_b + h64 * acc_h
    acc_at += places(index, acc_s, acc_h, PACK)[:, None] + e[None, :]
    wide = inside[:, None] & (e < VD)[None, :]
    if BEGINS:
        acc = tl.zeros([ROWS, PADDED_VD], tl.float32)
    else:
        # What no key has reached is zero and need not be read.
        acc = tl.load(acc_at, mask=wide & (m > float("-inf"))[:, None], other=0.0)

    met = tl.zeros([ROWS], tl.int32)
    # The upper edge, what all rows see, the lower edge; for CLEANS all of it is an edge.
    for phase in tl.static_range(0 if CLEANS else FROM, 1 if CLEANS else TO):
        high = stop if phase == 0 else inner_stop if phase == 1 else inner
        low = inner_stop if phase == 0 else inner if phase == 1 else start
        for n in range(0, high - low):
            acc, m, l, met = _step(
                acc, m, l, met, q, K, V, high - 1 - n, i, first, end, batch + batch0, head + head0, values,
                k_s, v_s, num_cols, row, col, step, scale,
                D, VD, PADDED_D, PADDED_VD, COLS, SCORES, DRAWS, WEIGHS, PLAIN, phase != 1,
                CLEANS, WIDE,
            )  # fmt: skip

    if CLEANS:
        acc = tl.where(met[:, None] > 0, float("nan"), acc)
    tl.store(acc_at, acc, mask=wide)
    tl.store(M + m_at, m, mask=inside)
    tl.store(L + m_at, l, mask=inside)
