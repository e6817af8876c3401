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

from seqpar.comm import arrival, once
from seqpar.strategies.plan import Plan
from seqpar.strategies.stored_scores import ByColumns, ByDepth, ByRows, Sharding
from seqpar.strategies.strategy import Strategy
from seqpar_kernels import (
    Place,
    Totals,
    dense,
    finished_gradients,
    first_only,
    sum_rows,
    tables,
)
from seqpar_kernels.row_softmax import add_dot_, add_sums_, join_, score_gradient, weights
from seqpar_kernels.terms.modifiers import check_held, held_by
from seqpar_kernels.transfer import on_device

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

    The call has been checked. Gradients of learned tensors are this rank's share.
    """
    score = plan.score.resolve(q.shape[-1])
    plan = replace(plan, score=score.without_tensors())
    tensors = score.tensors
    return _Materialised.apply(plan, tuple(tensors), q, k, v, *tensors.values(), *score.captured)


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
    s, _, _ = dense.scores_(keys.outer(sharding.of_rows(q), keys.of_cols(k), cells), cells)
    p, _ = _softmax(s, sharding, plan)
    return sharding.in_order(p)


class _Materialised(torch.autograd.Function):
    """q [b sl hq d], k [b slk hkv d], v [b slk hkv vd] of this rank -> out [b sl hq vd], lse [b sl hq].

    forward   p = softmax(q k^T), out = p v
    backward  dp = dout v^T, ds = p (dp - delta + dlse), dq = ds k, dk = ds^T q, dv = p^T dout
              learned tensors get the share of their gradient that this rank has
    saved     p, this rank's shard of the matrix, in float32 or wider, and the derivative of bent scores
              q k v as products with that shard take them: by rows this rank's own but all keys, by
              columns all queries, by depth a slice of all; out, lse
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        names: tuple[str, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *held: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # A `score_mod` holds the others itself; here they are only so that gradients reach them.
        tensors = held[: len(names)]
        ctx.arrive = arrival()
        ctx.plan, ctx.names, ctx.shapes = plan, names, (q.shape, k.shape, v.shape)
        scored = _scored(plan, names, tensors)
        q_x, k_x, v_x, p, out, lse, *rest = once(
            lambda: _forward(q, k, v, scored), 6 + plan.score.bends + bool(plan.score.captured)
        )
        bend, before, *_ = *rest, None, None
        ctx.held = held_by(plan.functions)
        ctx.save_for_backward(q_x, k_x, v_x, out, lse, p, bend, before, *tensors, *ctx.held)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @first_only
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.arrive()
        dout, dlse = grad_outputs
        q_x, k_x, v_x, out, lse, p, bend, before, *tensors = ctx.saved_tensors
        check_held(ctx.held, ctx.plan.functions)
        tensors = tensors[: len(ctx.names)]
        plan = _scored(ctx.plan, ctx.names, tuple(tensors))
        wanted = [n for n, w in zip(ctx.names, ctx.needs_input_grad[5:], strict=False) if w]
        sharding, cells = _stored(plan, out.device)
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        delta = torch.zeros_like(lse) if dlse is None else -dlse
        add_dot_(out, dout, delta, implementation=plan.implementation)
        dout_x, delta_x = sharding.of_rows(dout), sharding.spread(delta)
        dp = dense.dropped(sharding.outer(dout_x, v_x, cells), cells)
        ds = score_gradient(p, dp, delta_x, implementation=plan.implementation)
        del dp
        learned = {
            name: sharding.share(x).sum((0, 2))
            for name, x in dense.learned_gradients(ds, cells, wanted).items()
        }
        for name, x in finished_gradients(plan.score, lse, delta, wanted).items():
            learned[name] = sum_rows(x)
        of_tables, held = tables(plan.score, wanted), plan.score.captured
        totals = Totals((*of_tables.values(), *held))
        if totals.sums:
            # Rows that other ranks have too are counted once.
            place = replace(cells.place, row=sharding.share(cells.place.row))
            own = sharding.share(ds.mT).mT
            given = None if before is None else sharding.share(before.mT).mT
            for term in cells.acting:
                if term.has_sums:
                    term.add_gradients_(own, given, place, totals.sums)
        found: dict[str, Tensor | None] = {
            name: x.to(plan.score.tensors[name].dtype) for name, x in learned.items()
        }
        found |= {name: totals.take(x) for name, x in of_tables.items()}
        dx = dense.product_gradient_(ds, bend, cells)
        dq = sharding.for_keys().times(dx, k_x, ctx.shapes[0], cells)
        dk = sharding.transposed_times(dx, q_x, ctx.shapes[1], cells)
        # Dropped weights for dv are a matrix too, so that of dq and dk goes first.
        del ds, dx
        dv = sharding.transposed_times(dense.dropped(p, cells), dout_x, ctx.shapes[2], cells)
        shares = [*(found.get(name) for name in ctx.names), *map(totals.take, held)]
        return None, None, *(x.to(out.dtype) for x in (dq, dk, dv)), *shares


def _scored(plan: Plan, names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Plan:
    """The plan with the tensors of its score."""
    return replace(plan, score=plan.score.with_tensors(dict(zip(names, tensors, strict=True))))


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """Gives (q, k, v as products with the shard take them, p, out, lse) and the derivative of bent scores."""
    sharding, cells = _stored(plan, q.device)
    # docs/design.md: materialised attention is three products
    keys = sharding.for_keys()
    q_x, k_x, v_x = sharding.of_rows(q), keys.of_cols(k), sharding.of_cols(v)
    s, bend, before = dense.scores_(keys.outer(q_x, k_x, cells), cells)
    p, lse = _softmax(s, sharding, plan)
    del s  # no longer needed, and as large as what follows
    shape = torch.Size((*q.shape[:3], v.shape[3]))
    out = sharding.times(dense.dropped(p, cells), v_x, shape, cells).to(q.dtype)
    return q_x, k_x, v_x, p, out, lse, *(x for x in (bend, before) if x is not None)


def _stored(plan: Plan, device: torch.device) -> tuple[Sharding, dense.Cells]:
    """The sharding of the matrix, and the cells of it that are stored here."""
    sharding = SHARDINGS[plan.strategy](plan.group, plan.layout, plan.keys)
    # docs/design.md: where rows stand over keys of another length is said
    shift = plan.masks[0].shift
    positions = zip(sharding.positions(), shift, strict=True)
    row, col = (on_device(x + by, device) for x, by in positions)
    lengths = plan.layout.length + shift[0], plan.keys.length + shift[1]
    place = Place(row, col, plan.first_head)
    seen = tuple((batch, dense.Seen(mask.layers, mask.mods)) for batch, mask in plan.by_batch)
    cells = dense.Cells(place, seen, plan.score, lengths, plan.dropping)
    return sharding, cells


def _softmax(
    s: Float[Tensor, "b hq i j"], sharding: Sharding, plan: Plan
) -> tuple[Float[Tensor, "b hq i j"], Float[Tensor, "b sl hq"]]:
    """Makes weights of scores: (weights, lse of own rows)."""
    implementation = plan.implementation
    tops = s.new_full(s.shape[:3], -torch.inf)
    sums = torch.zeros_like(tops)
    add_sums_(s, tops, sums, implementation=implementation)
    sharding.combine_(tops, sums)
    join_(plan.score, s, tops, sums, implementation=implementation)
    p = weights(s, tops, sums, s.dtype, implementation=implementation)
    return p, sharding.own(tops + torch.log(sums))


MATERIALISED = tuple(
    Strategy(name, materialised_attention, stores_scores=True) for name in SHARDINGS
)
