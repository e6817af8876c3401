"""Materialised attention: the score matrix is really stored, in shards by rows, by columns or by depth.

For study, comparison and a look at the weights; for long sequences take a strategy that never stores it.
One forward and one backward serve all three: see `Sharding` for what each moves between ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.comm import Count, once
from seqpar.layout import Layout, Span
from seqpar.strategies.plan import Plan
from seqpar.strategies.stored_scores import ByColumns, ByDepth, ByRows, Sharding, slices
from seqpar.strategies.volume import Shape, Volume
from seqpar_kernels import Implementation, accumulation_dtype, dense, sink_gradient
from seqpar_kernels.row_softmax import add_dot_, add_sums_, score_gradient, weights

SHARDINGS: dict[str, type[Sharding]] = {
    "materialised_rows": ByRows,
    "materialised_columns": ByColumns,
    "materialised_depth": ByDepth,
}


def materialised_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
    *,
    with_lse: bool = False,  # noqa: ARG001 - it always may be
) -> tuple[Float[Tensor, "b sl hq vd"], Float[Tensor, "b sl hq"]]:
    """(out, lse) of this rank's rows of softmax(q k^T) v, both differentiable. All ranks must call.

    The call has been checked. Gradients of slopes and sinks are this rank's share.
    """
    score = plan.score.resolve(q.shape[-1])
    return _Materialised.apply(q, k, v, score.alibi_slopes, score.sinks, replace(plan, score=score))


@torch.no_grad()
def attention_weights(
    q: Float[Tensor, "b sl hq d"], k: Float[Tensor, "b slk hkv d"], plan: Plan
) -> Float[Tensor, "b hq i j"]:
    """This rank's shard of softmax(q k^T), before dropout, in float32 or wider. All ranks must call.

    By rows, `[b hq sl s]`: own rows, columns in the order of positions. By columns, `[b hq s slk]`: rows
    in the order of positions, own columns. By depth `[b hq s s]`: all of it, on every rank. Rows that see
    nothing are zero; where there are sinks, rows sum to less than 1.
    """
    plan = replace(plan, score=plan.score.resolve(q.shape[-1]))
    sharding, cells = _stored(plan, q.device)
    keys = sharding.for_keys()
    s, _ = dense.scores_(keys.outer(sharding.of_rows(q), keys.of_cols(k)), cells)
    p, _ = _softmax(s, sharding, plan.score.sinks, plan.implementation)
    return sharding.in_order(p)


def materialised_volume(plan: Plan, rank: int, shape: Shape) -> Volume:
    """What `rank` sends, for even shards of N queries and M keys; f = (P-1)/P, hq = nq d, hk = nk d.

    By rows: forward f M 2hk, k gathered and v passed on; backward f M 3hk, v again, and dk and dv home.
    By columns: forward f N (2hq + 4nq), q, the maxima and sums all-reduced, and out; backward
    f N (2hq + nq), dout and delta, and dq.
    By depth: forward f/P (N 2hq + M 2hk) + 2f nq N M, the partial scores all-reduced; backward the same
    and f N nq, delta.
    What is summed over ranks, and statistics, are in float32 or wider.
    """
    return _VOLUMES[plan.strategy](plan, rank, shape)


class _Materialised(torch.autograd.Function):
    """q [b sl hq d], k [b slk hkv d], v [b slk hkv vd] of this rank -> out [b sl hq vd], lse [b sl hq].

    forward   p = softmax(q k^T), out = p v
    backward  dp = dout v^T, ds = p (dp - delta + dlse), dq = ds k, dk = ds^T q, dv = p^T dout
              slopes and sinks `[hq]` get the share of their gradient that this rank has
    saved     p, this rank's shard of the matrix, in float32 or wider, and with a softcap its derivative
              q k v as products with that shard take them: by rows this rank's own but all keys, by
              columns all queries, by depth a slice of all; out, lse
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        sinks: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor]:
        ctx.shapes = q.shape, k.shape, v.shape
        num = 6 if plan.score.softcap is None else 7
        q_x, k_x, v_x, p, out, lse, *bend = once(lambda: _forward(q, k, v, sinks, plan), num)
        ctx.plan = replace(plan, score=replace(plan.score, alibi_slopes=None, sinks=None))
        ctx.save_for_backward(q_x, k_x, v_x, slopes, sinks, out, lse, p, bend[0] if bend else None)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (dout, dlse), plan = grad_outputs, ctx.plan
        q_x, k_x, v_x, slopes, sinks, out, lse, p, bend = ctx.saved_tensors
        sharding, cells = _stored(plan, out.device)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        delta = torch.zeros_like(lse) if dlse is None else -dlse
        add_dot_(out, dout, delta, implementation=plan.implementation)
        dout_x, delta_x = sharding.of_rows(dout), sharding.spread(delta)
        dp = dense.dropped(sharding.outer(dout_x, v_x), cells)
        ds = score_gradient(p, dp, delta_x, implementation=plan.implementation)
        del dp
        dslopes = None
        if ctx.needs_input_grad[3]:
            dslopes = sharding.share(dense.slope_gradient(ds, cells)).sum((0, 2)).to(slopes.dtype)
        dx = dense.product_gradient_(ds, bend, cells)
        dq = sharding.for_keys().times(dx, k_x, ctx.shapes[0])
        dk = sharding.transposed_times(dx, q_x, ctx.shapes[1])
        del ds, dx
        dv = sharding.transposed_times(dense.dropped(p, cells), dout_x, ctx.shapes[2])
        return (
            *(x.to(out.dtype) for x in (dq, dk, dv)),
            dslopes,
            sink_gradient(sinks, lse, delta) if ctx.needs_input_grad[4] else None,
            None,
        )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, plan: Plan
) -> tuple[Tensor, ...]:
    """(q, k, v as products with the shard take them, p, out, lse) and, with a softcap, its derivative."""
    sharding, cells = _stored(plan, q.device)
    keys = sharding.for_keys()
    q_x, k_x, v_x = sharding.of_rows(q), keys.of_cols(k), sharding.of_cols(v)
    s, bend = dense.scores_(keys.outer(q_x, k_x), cells)
    p, lse = _softmax(s, sharding, sinks, plan.implementation)
    del s  # no longer needed, and as large as what follows
    shape = torch.Size((*q.shape[:3], v.shape[3]))
    out = sharding.times(dense.dropped(p, cells), v_x, shape).to(q.dtype)
    return (q_x, k_x, v_x, p, out, lse) if bend is None else (q_x, k_x, v_x, p, out, lse, bend)


def _stored(plan: Plan, device: torch.device) -> tuple[Sharding, dense.Cells]:
    """Who stores what of the matrix, and what is done to the scores stored here."""
    sharding = SHARDINGS[plan.strategy](plan.group, plan.layout, plan.keys)
    row, col = (x.to(device) for x in sharding.positions())
    position = Span(0, 1)
    band = plan.mask.band(position, position)
    cells = dense.Cells(row, col, band, plan.score, plan.drops, plan.packed, plan.first_head)
    return sharding, cells


def _softmax(
    s: Float[Tensor, "b hq i j"],
    sharding: Sharding,
    sinks: Float[Tensor, "hq"] | None,
    implementation: Implementation | None,
) -> tuple[Float[Tensor, "b hq i j"], Float[Tensor, "b sl hq"]]:
    """The weights, and the lse of own rows."""
    tops = s.new_full(s.shape[:3], -torch.inf)
    sums = torch.zeros_like(tops)
    add_sums_(s, tops, sums, implementation=implementation)
    sharding.combine_(tops, sums)
    if sinks is not None:
        columns = sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
        add_sums_(columns, tops, sums, implementation=implementation)
    p = weights(s, tops, sums, s.dtype, implementation=implementation)
    return p, sharding.own(tops + torch.log(sums))


def _rows_volume(plan: Plan, rank: int, shape: Shape) -> Volume:
    keys = plan.keys
    gathered = shape.count(shape.hkv * shape.d * keys.rows[rank] * (keys.size - 1))
    passed = keys.length - keys.rows[(rank + 1) % keys.size]
    values = shape.count(shape.hkv * shape.vd * passed)
    home = shape.count(shape.kv * (keys.length - keys.rows[rank]), wide=True)
    return Volume(gathered + values, values + home)


def _columns_volume(plan: Plan, rank: int, shape: Shape) -> Volume:
    length, size, own = plan.layout.length, plan.layout.size, plan.layout.rows[rank]
    gathered, scattered = shape.hq * own * (size - 1), shape.hq * (length - own)
    statistic = _all_reduced(shape, shape.hq * length, size)
    forward = shape.count(gathered * shape.d) + shape.count(scattered * shape.vd, wide=True)
    backward = shape.count(gathered * shape.vd) + shape.count(scattered * shape.d, wide=True)
    return Volume(forward + statistic + statistic, backward + shape.count(gathered, wide=True))


def _depth_volume(plan: Plan, rank: int, shape: Shape) -> Volume:
    size = plan.layout.size

    def traded(layout: Layout, heads: int, width: int) -> tuple[Count, Count]:
        """What goes out when rows are traded for slices, and when they are traded back."""
        own, (start, stop) = layout.rows[rank], slices(width, size)[rank]
        there, back = own * (width - stop + start), (layout.length - own) * (stop - start)
        return shape.count(heads * there), shape.count(heads * back)

    (q, dq), (dout, out) = (traded(plan.layout, shape.hq, w) for w in (shape.d, shape.vd))
    (k, dk), (v, dv) = (traded(plan.keys, shape.hkv, w) for w in (shape.d, shape.vd))
    scores = _all_reduced(shape, shape.hq * plan.layout.length * plan.keys.length, size)
    delta = shape.count(shape.hq * plan.layout.rows[rank] * (size - 1), wide=True)
    return Volume(q + k + v + scores + out, dout + delta + scores + dq + dk + dv)


def _all_reduced(shape: Shape, elements: int, size: int) -> Count:
    """What one all-reduce of so many elements per batch entry counts."""
    sent = -(-2 * (size - 1) * shape.batch * elements // size)
    return Count(sent, sent * accumulation_dtype(shape.dtype).itemsize)


_VOLUMES = {
    "materialised_rows": _rows_volume,
    "materialised_columns": _columns_volume,
    "materialised_depth": _depth_volume,
}
