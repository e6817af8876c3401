"""Ring attention: queries stay home, key/value blocks make one trip round the group.

Contiguous, zigzag, striped and uneven shards differ only in `plan.layout`, so there is one forward
loop and one backward loop. Source: Liu et al. 2023, Ring Attention (arXiv:2310.01889), section 3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.comm import RingSum, ring_pass
from seqpar.layout import Layout, Span
from seqpar.strategies.plan import Plan
from seqpar.strategies.volume import Shape, Volume
from seqpar_kernels import (
    Block,
    Partial,
    Rows,
    accumulation_dtype,
    attend,
    attend_backward,
    attention,
    finish,
    sink_gradient,
)


def ring_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b sl hkv d"],
    v: Float[Tensor, "b sl hkv vd"],
    plan: Plan,
    head: int = 0,
) -> Float[Tensor, "b sl hq vd"]:
    """This rank's rows of softmax(q k^T) v. The call has been checked; all ranks must call.

    One rank alone is one block: an op that compilers and checkpointing policies know by name.

    Args:
        head: which of the attention's query heads is the first of q.
    """
    score = plan.score.resolve(q.shape[-1]).of_heads(head, q.shape[2])
    if plan.group.size == 1 and len(plan.layout.spans[0]) <= 1:
        rows = Span(0, plan.layout.length)
        band = plan.mask.band(rows, rows)
        block = Block(band, score, head=head, dropout=plan.drops, documents=plan.packed)
        out, _ = attention(q, k, v, block, implementation=plan.implementation)
        return out
    return _Ring.apply(q, k, v, score.alibi_slopes, score.sinks, replace(plan, score=score), head)


def ring_volume(layout: Layout, rank: int, shape: Shape) -> Volume:
    """What `rank` sends.

    Forward, k and v of every block but the one that the next rank owns: for even shards
    (P-1)/P N 2hk elements. Backward, the same again, and the sums of dk and dv, in float32 or wider,
    for every block but this rank's own. One rank alone sends nothing.
    """
    blocks = shape.kv * (layout.length - layout.rows[(rank + 1) % layout.size])
    sums = shape.kv * (layout.length - layout.rows[rank])
    forward = shape.count(blocks)
    return Volume(forward, forward + shape.count(sums, wide=True))


class _Ring(torch.autograd.Function):
    """q [b sl hq d], k [b sl hkv d], v [b sl hkv vd] of this rank -> out [b sl hq vd].

    forward   out = merge over owners o of attend(q, k_o, v_o)
    backward  dq accumulates here; the sum of dk_o, dv_o follows block o and comes home to its owner
              slopes and sinks `[hq]` get the share of their gradient that this rank's rows have
    saved     q k v out lse: this rank's own rows, never a gathered sequence
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
        head: int,
    ) -> Tensor:
        score = replace(plan.score, alibi_slopes=slopes, sinks=sinks)
        running = Partial.identity(q, v.shape[-1])
        for owner, (k_o, v_o) in ring_pass((k, v), plan.group, plan.layout.rows):
            for rows, cols, block in plan.blocks(owner, score, head):
                attend(
                    q[:, rows], k_o[:, cols], v_o[:, cols], block,
                    into=running[rows], implementation=plan.implementation,
                )  # fmt: skip
            del k_o, v_o  # or they live on while the next block arrives
        out, lse = finish(running, q.dtype, sinks, implementation=plan.implementation)
        ctx.plan = replace(plan, score=replace(score, alibi_slopes=None, sinks=None))
        ctx.head = head
        ctx.save_for_backward(q, k, v, slopes, sinks, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dout,), plan = grad_outputs, ctx.plan
        q, k, v, slopes, sinks, out, lse = ctx.saved_tensors
        score = replace(plan.score, alibi_slopes=slopes)
        wide = accumulation_dtype(q.dtype)
        mine = Rows.of(q, out, dout, lse, implementation=plan.implementation)
        dq = torch.zeros(q.shape, dtype=wide, device=q.device)
        dslopes = torch.zeros_like(lse) if ctx.needs_input_grad[3] else None
        sums = RingSum(plan.group, plan.layout.rows)
        for owner, (k_o, v_o) in ring_pass((k, v), plan.group, plan.layout.rows):
            dk_o, dv_o = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k_o, v_o))
            for rows, cols, block in plan.blocks(owner, score, ctx.head):
                attend_backward(
                    mine[rows], k_o[:, cols], v_o[:, cols], block,
                    into=(dq[:, rows], dk_o[:, cols], dv_o[:, cols]),
                    dslopes=None if dslopes is None else dslopes[:, rows],
                    implementation=plan.implementation,
                )  # fmt: skip
            sums.add(owner, (dk_o, dv_o))
            del k_o, v_o, dk_o, dv_o  # or they live on while the next block arrives
        dk, dv = sums.home()
        return (
            dq.to(q.dtype),
            dk.to(k.dtype),
            dv.to(v.dtype),
            None if dslopes is None else dslopes.sum((0, 1)).to(slopes.dtype),
            sink_gradient(sinks, lse, mine.delta) if ctx.needs_input_grad[4] else None,
            None,
            None,
        )
