"""The backward kernels, from the global lse and delta, with no atomics.

`dq_kernel`: a tile of query rows walks its key tiles downwards, as in the forward. `dkdv_kernel`: a tile
of keys walks the query tiles that see it upwards, all heads of its group in each, so that the order of
additions depends neither on how the keys were cut into blocks nor on who computes which head.
Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
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
def _weights(
    x, dp, lse, delta, visible, place, values, scale,
    SCORES: tl.constexpr, DRAWS: tl.constexpr, WEIGHS: tl.constexpr, PLAIN: tl.constexpr,
    MASKED: tl.constexpr, CLEANS: tl.constexpr,
):  # fmt: skip
    """(p after dropout, ds, dx) of a tile, from x = q.k and dp = dout.v.

    Everything broadcasts, so the tile may lie either way round. dx is the gradient of q.k.
    """
    s, bend = scores(x, place, values, scale, SCORES, PLAIN)
    p = tl.exp2(s * (unit(scale, PLAIN) * LOG2E) - lse * LOG2E)
    if MASKED:
        p = tl.where(visible, p, 0.0)
    drawn = draws(place, values, DRAWS)
    dropped = weighed(p, drawn, values, WEIGHS)
    dp = weighed(dp, drawn, values, WEIGHS)
    ds = p * (dp - delta)
    dx = ds * (bend * scale)
    if CLEANS:  # 0 * NaN is NaN
        ds, dx = tl.where(visible, ds, 0.0), tl.where(visible, dx, 0.0)
    return dropped, ds, dx


@triton.jit(do_not_specialize=[
    "num_rows", "num_cols", "heads", "all_packs", "num_tiles", "section",
    "lower", "upper", "row", "col", "step", "head0", "batch0", "whole_0", "whole_1",
])  # fmt: skip
def dq_kernel(
    Q, K, V, DOUT, LSE, DELTA, DQ, LIMITS, FLAGS, VALUES, LEARNED,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, dout_b, dout_s, dout_h,
    lse_b, lse_s, lse_h, delta_b, delta_s, delta_h, dq_b, dq_s, dq_h,
    num_rows, num_cols, heads, all_packs, num_tiles, section,
    lower, upper, row, col, step, head0, batch0, scale, whole_0, whole_1,
    GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, VD: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_VD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    LOADS: tl.constexpr, SCORES: tl.constexpr, DRAWS: tl.constexpr, WEIGHS: tl.constexpr,
    WHOLE: tl.constexpr, SOURCES: tl.constexpr, PLAIN: tl.constexpr,
    LIMITED: tl.constexpr, REVERSED: tl.constexpr, WIDE: tl.constexpr,
    FROM: tl.constexpr, TO: tl.constexpr, SHARES: tl.constexpr, BEGINS: tl.constexpr,
    GUARDED: tl.constexpr, CLEANS: tl.constexpr,
):  # fmt: skip
    """Adds to dq `[b i hq d]` and to each (pointer, strides) of LEARNED `[b i hq]`, float32.

    LEARNED has one entry for each of SHARES: (term, function). Where dq BEGINS it is written. Else as
    `forward_kernel`.
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
        in_k = edges_hold(K, k_s, num_cols, start, inner, inner_stop, stop, COLS, D, PADDED_D, WIDE)
        in_v = edges_hold(
            V, v_s, num_cols, start, inner, inner_stop, stop, COLS, VD, PADDED_VD, WIDE
        )
        flag = tl.maximum(in_k, in_v)
        tl.store(FLAGS + tl.program_id(0), flag)
        inside = inside & (flag > 0)
        inner, inner_stop, stop = start, start, tl.where(flag > 0, stop, start)
    elif GUARDED:
        inside = inside & (tl.load(FLAGS + tl.program_id(0)) == 0)
    values = loaded(VALUES, (whole_0, whole_1), head[:, None], LOADS, WHOLE)

    d, e = tl.arange(0, PADDED_D), tl.arange(0, PADDED_VD)
    narrow, wide = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < VD)[None, :]
    q_at = Q + b64 * q_b + h64 * q_h + places(index, q_s, q_h, PACK)[:, None] + d[None, :]
    q = tl.load(q_at, mask=narrow, other=0.0)
    dout_at = b64 * dout_b + h64 * dout_h + places(index, dout_s, dout_h, PACK)
    dout = tl.load(DOUT + dout_at[:, None] + e[None, :], mask=wide, other=0.0)
    lse_at = b64 * lse_b + h64 * lse_h + places(index, lse_s, lse_h, PACK)
    lse = tl.load(LSE + lse_at, mask=inside, other=0.0)
    delta_at = b64 * delta_b + h64 * delta_h + places(index, delta_s, delta_h, PACK)
    delta = tl.load(DELTA + delta_at, mask=inside, other=0.0)
    dq_at = DQ + b64 * dq_b + h64 * dq_h + places(index, dq_s, dq_h, PACK)[:, None] + d[None, :]
    if BEGINS:
        dq = tl.zeros([ROWS, PADDED_D], tl.float32)
    else:
        dq = tl.load(dq_at, mask=narrow, other=0.0)
    shares = ()
    for n in tl.static_range(len(SHARES)):
        x_at = _learned_at(LEARNED[n], b64, h64, index, PACK)
        shares = shares + (tl.load(x_at, mask=inside, other=0.0),)

    met = tl.zeros([ROWS], tl.int32)
    # The upper edge, what all rows see, the lower edge; for CLEANS all of it is an edge.
    for phase in tl.static_range(0 if CLEANS else FROM, 1 if CLEANS else TO):
        high = stop if phase == 0 else inner_stop if phase == 1 else inner
        low = inner_stop if phase == 0 else inner if phase == 1 else start
        for n in range(0, high - low):
            t = high - 1 - n
            j = t * COLS + tl.arange(0, COLS)
            visible = (j[None, :] >= first[:, None]) & (j[None, :] < end[:, None])
            k = load_tile(K, t * COLS, k_s, num_cols, COLS, D, PADDED_D, phase != 1, WIDE)
            v = load_tile(V, t * COLS, v_s, num_cols, COLS, VD, PADDED_VD, phase != 1, WIDE)
            x = dot(q, tl.trans(k))
            dp = dot(dout, tl.trans(v))
            place = i[:, None], j[None, :], row, col, step, batch + batch0, head[:, None] + head0
            _, ds, dx = _weights(
                x, dp, lse[:, None], delta[:, None], visible, place, values, scale,
                SCORES, DRAWS, WEIGHS, PLAIN, phase != 1, CLEANS,
            )  # fmt: skip
            shares = _shared(shares, ds, place, values, SHARES)
            if CLEANS:
                met, k = tl.maximum(met, meets(visible, k)), cleaned(k)
            dq = dot_add(dx, k, dq)

    if CLEANS:
        dq = tl.where(met[:, None] > 0, float("nan"), dq)
    tl.store(dq_at, dq, mask=narrow)
    for n in tl.static_range(len(SHARES)):
        tl.store(_learned_at(LEARNED[n], b64, h64, index, PACK), shares[n], mask=inside)


@triton.jit
def _learned_at(x, batch, head, index, PACK: tl.constexpr):
    """Where the rows of a tile are in one of LEARNED."""
    pointer, x_b, x_s, x_h = x
    return pointer + batch * x_b + head * x_h + places(index, x_s, x_h, PACK)


@triton.jit
def _shared(shares, ds, place, values, SHARES: tl.constexpr):
    """The sums of each row, continued with a tile."""
    continued = ()
    for n in tl.static_range(len(SHARES)):
        t: tl.constexpr = SHARES[n][0]
        continued = continued + (shares[n] + SHARES[n][1](ds, place, values[t]),)
    return continued


@triton.jit(do_not_specialize=[
    "num_rows", "num_cols", "kv_heads", "all_heads", "num_tiles", "section",
    "lower", "upper", "row", "col", "step", "head0", "batch0", "whole_0", "whole_1",
])  # fmt: skip
def dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, LIMITS, FLAGS, VALUES,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, dout_b, dout_s, dout_h,
    lse_b, lse_s, lse_h, delta_b, delta_s, delta_h, dk_b, dk_s, dk_h, dv_b, dv_s, dv_h,
    num_rows, num_cols, kv_heads, all_heads, num_tiles, section,
    lower, upper, row, col, step, head0, batch0, scale, whole_0, whole_1,
    GROUP: tl.constexpr, D: tl.constexpr, VD: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_VD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    LOADS: tl.constexpr, SCORES: tl.constexpr, DRAWS: tl.constexpr, WEIGHS: tl.constexpr,
    WHOLE: tl.constexpr, SOURCES: tl.constexpr, PLAIN: tl.constexpr,
    LIMITED: tl.constexpr, REVERSED: tl.constexpr, WIDE: tl.constexpr,
    FROM: tl.constexpr, TO: tl.constexpr, BEGINS: tl.constexpr,
    GUARDED: tl.constexpr, CLEANS: tl.constexpr,
):  # fmt: skip
    """Adds to dk `[b j hkv d]`, dv `[b j hkv vd]`, float32, or writes them where they BEGIN.

    LIMITS `[j 2]`: rows of a column's document.
    """
    tile, kv_head = program(num_tiles, all_heads, section, REVERSED)
    batch, g = kv_head // kv_heads, kv_head % kv_heads
    b64, g64 = batch.to(tl.int64), g.to(tl.int64)
    j = tile * COLS + tl.arange(0, COLS)
    inside = j < num_cols
    first, end = sees(tl.minimum(j, num_cols - 1), -upper, -lower, num_rows, LIMITS, LIMITED)
    start, inner, inner_stop, stop = visits(first, end, ROWS, TO == 2)
    if CLEANS:
        flag = 0
        for n in range(GROUP):
            h64 = (g * GROUP + n).to(tl.int64)
            in_q = edges_hold(
                Q + b64 * q_b + h64 * q_h, q_s, num_rows, start, inner, inner_stop, stop,
                ROWS, D, PADDED_D, WIDE,
            )  # fmt: skip
            in_dout = edges_hold(
                DOUT + b64 * dout_b + h64 * dout_h, dout_s, num_rows,
                start, inner, inner_stop, stop, ROWS, VD, PADDED_VD, WIDE,
            )  # fmt: skip
            in_delta = edges_hold(
                DELTA + b64 * delta_b + h64 * delta_h, delta_s, num_rows,
                start, inner, inner_stop, stop, ROWS, 1, 1, WIDE,
            )  # fmt: skip
            flag = tl.maximum(flag, tl.maximum(in_q, tl.maximum(in_dout, in_delta)))
        tl.store(FLAGS + tl.program_id(0), flag)
        inside = inside & (flag > 0)
        inner, inner_stop, stop = stop, stop, stop
        start = tl.where(flag > 0, start, stop)
    elif GUARDED:
        inside = inside & (tl.load(FLAGS + tl.program_id(0)) == 0)

    K += b64 * k_b + g64 * k_h
    V += b64 * v_b + g64 * v_h
    k = load_tile(K, tile * COLS, k_s, num_cols, COLS, D, PADDED_D, True, WIDE)
    v = load_tile(V, tile * COLS, v_s, num_cols, COLS, VD, PADDED_VD, True, WIDE)
    d, e = tl.arange(0, PADDED_D), tl.arange(0, PADDED_VD)
    narrow, wide = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < VD)[None, :]
    j64 = tl.minimum(j, num_cols - 1).to(tl.int64)[:, None]
    dk_at = DK + b64 * dk_b + g64 * dk_h + j64 * dk_s + d[None, :]
    dv_at = DV + b64 * dv_b + g64 * dv_h + j64 * dv_s + e[None, :]
    if BEGINS:
        dk, dv = tl.zeros([COLS, PADDED_D], tl.float32), tl.zeros([COLS, PADDED_VD], tl.float32)
    else:
        dk = tl.load(dk_at, mask=narrow, other=0.0)
        dv = tl.load(dv_at, mask=wide, other=0.0)

    met_q, met_dout = tl.zeros([COLS], tl.int32), tl.zeros([COLS], tl.int32)
    # The first rows that see a key, all that see all, the last.
    for phase in tl.static_range(0 if CLEANS else FROM, 1 if CLEANS else TO):
        low = start if phase == 0 else inner if phase == 1 else inner_stop
        high = inner if phase == 0 else inner_stop if phase == 1 else stop
        for n in range(low * GROUP, high * GROUP):
            t, h = n // GROUP, g * GROUP + n % GROUP
            h64 = h.to(tl.int64)
            i = t * ROWS + tl.arange(0, ROWS)
            visible = (i[None, :] >= first[:, None]) & (i[None, :] < end[:, None])
            there = i < num_rows
            q = load_tile(
                Q + b64 * q_b + h64 * q_h, t * ROWS, q_s, num_rows,
                ROWS, D, PADDED_D, phase != 1, WIDE,
            )  # fmt: skip
            dout = load_tile(
                DOUT + b64 * dout_b + h64 * dout_h, t * ROWS, dout_s, num_rows,
                ROWS, VD, PADDED_VD, phase != 1, WIDE,
            )  # fmt: skip
            i64 = i.to(tl.int64)
            lse = tl.load(LSE + b64 * lse_b + h64 * lse_h + i64 * lse_s, mask=there, other=0.0)
            delta_at = DELTA + b64 * delta_b + h64 * delta_h + i64 * delta_s
            delta = tl.load(delta_at, mask=there, other=0.0)
            values = loaded(VALUES, (whole_0, whole_1), h, LOADS, WHOLE)
            x = dot(k, tl.trans(q))
            dp = dot(v, tl.trans(dout))
            place = i[None, :], j[:, None], row, col, step, batch + batch0, h + head0
            p, _, dx = _weights(
                x, dp, lse[None, :], delta[None, :], visible, place, values, scale,
                SCORES, DRAWS, WEIGHS, PLAIN, phase != 1, CLEANS,
            )  # fmt: skip
            if CLEANS:
                met_q, q = tl.maximum(met_q, meets(visible, q)), cleaned(q)
                met_dout, dout = tl.maximum(met_dout, meets(visible, dout)), cleaned(dout)
            dv = dot_add(p, dout, dv)
            dk = dot_add(dx, q, dk)

    if CLEANS:
        dk = tl.where(met_q[:, None] > 0, float("nan"), dk)
        dv = tl.where(met_dout[:, None] > 0, float("nan"), dv)
    tl.store(dk_at, dk, mask=narrow)
    tl.store(dv_at, dv, mask=wide)
