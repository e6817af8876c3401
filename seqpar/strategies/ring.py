"""Ring attention: queries stay home, key/value blocks make one trip round the group.

Contiguous, zigzag, striped and uneven shards differ only in `plan.layout`, so there is one forward
loop and one backward loop. Source: Liu et al. 2023, Ring Attention (arXiv:2310.01889), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.comm import RingSum, ring_pass
from seqpar.layout import Layout
from seqpar.strategies.plan import Plan
from seqpar.strategies.volume import Shape, Volume
from seqpar_kernels import Partial, Rows, accumulation_dtype, attend, attend_backward


def ring_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b sl hkv d"],
    v: Float[Tensor, "b sl hkv vd"],
    plan: Plan,
) -> Float[Tensor, "b sl hq vd"]:
    """This rank's rows of softmax(q k^T) v. The call has been checked; all ranks must call."""
    return _Ring.apply(q, k, v, plan)


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
    saved     q k v out lse: this rank's own rows, never a gathered sequence
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        score = plan.score.resolve(q.shape[-1])
        running = Partial.identity(q, v.shape[-1])
        for owner, (k_o, v_o) in ring_pass((k, v), plan.group, plan.layout.rows):
            for t in plan.tiles(owner):
                attend(
                    q[:, t.rows], k_o[:, t.cols], v_o[:, t.cols], t.band, score,
                    into=running[t.rows], implementation=plan.implementation,
                )  # fmt: skip
            del k_o, v_o  # or they live on while the next block arrives
        wide_out, lse = running.finish()
        out = wide_out.to(q.dtype)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (dout,), plan = grad_outputs, ctx.plan
        q, k, v, out, lse = ctx.saved_tensors
        score, wide = plan.score.resolve(q.shape[-1]), accumulation_dtype(q.dtype)
        rows = Rows.of(q, out, dout, lse)
        dq = torch.zeros_like(q, dtype=wide)
        sums = RingSum(plan.group, plan.layout.rows)
        for owner, (k_o, v_o) in ring_pass((k, v), plan.group, plan.layout.rows):
            dk_o, dv_o = torch.zeros_like(k_o, dtype=wide), torch.zeros_like(v_o, dtype=wide)
            for t in plan.tiles(owner):
                attend_backward(
                    rows[t.rows], k_o[:, t.cols], v_o[:, t.cols], t.band, score,
                    into=(dq[:, t.rows], dk_o[:, t.cols], dv_o[:, t.cols]),
                    implementation=plan.implementation,
                )  # fmt: skip
            sums.add(owner, (dk_o, dv_o))
            del k_o, v_o, dk_o, dv_o  # or they live on while the next block arrives
        dk, dv = sums.home()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
