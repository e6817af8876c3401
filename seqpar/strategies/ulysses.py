"""Ulysses: trade rows for heads, attend whole sequences on fewer heads, trade back.

The attention in the middle is the ring of a group of one, so this file adds no loop over blocks.
Source: Jacobs et al. 2023, DeepSpeed-Ulysses (arXiv:2309.14509), section 3.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.comm import Group, HeadTrade, heads_to_rows, rows_to_heads
from seqpar.layout import HeadSplit, Layout, split_heads, whole
from seqpar.strategies.plan import Plan
from seqpar.strategies.ring import ring_attention
from seqpar.strategies.volume import Shape, Volume


def ulysses_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b sl hkv d"],
    v: Float[Tensor, "b sl hkv vd"],
    plan: Plan,
) -> Float[Tensor, "b sl hq vd"]:
    """This rank's rows of softmax(q k^T) v. The call has been checked; all ranks must call.

    Any head counts: ranges of query heads differ by at most one, a kv head is sent to every rank
    whose query heads need it, and ranks beyond the number of heads attend nothing.
    """
    group, layout = plan.group, plan.layout
    if group.size == 1:
        return ring_attention(q, k, v, plan)
    heads = split_heads(q.shape[2], k.shape[2], group.size)
    places = tuple(layout.places(rank) for rank in range(group.size))
    there = HeadTrade(
        group, places, (heads.q, heads.kv, heads.kv), (heads.hq, heads.hkv, heads.hkv)
    )
    back = HeadTrade(group, places, (heads.q,), (heads.hq,))

    q_h, k_h, v_h = rows_to_heads((q, k, v), there)
    alone = replace(plan, group=Group.alone(), layout=whole(layout.length))
    first = heads.q[group.rank][0]
    outs = [
        ring_attention(q_h[:, :, s.q], k_h[:, :, s.kv], v_h[:, :, s.kv], alone, first + s.q.start)
        for s in heads.segments(group.rank)
    ]
    if not outs:  # no heads here: the same graph as elsewhere, of empty tensors
        outs = [ring_attention(q_h, k_h, v_h, alone)]
    out_h = torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]
    (out,) = heads_to_rows((out_h,), back)
    return out


def ulysses_volume(layout: Layout, rank: int, shape: Shape) -> Volume:
    """What `rank` sends.

    Forward, its rows of q, k, v to the ranks that take those heads, and all other rows of its heads
    of out: for even shards and heads (P-1)/P^2 N (2hq + 2hk) elements. Backward the same the other
    way round.
    """
    heads = split_heads(shape.hq, shape.hkv, layout.size)
    own, other = layout.rows[rank], layout.length - layout.rows[rank]
    hq, hkv = _taken(heads, rank)
    hq_away = shape.hq - hq
    hkv_away = sum(_taken(heads, r)[1] for r in range(layout.size) if r != rank)
    kv_width = shape.d + shape.vd
    forward = own * (hq_away * shape.d + hkv_away * kv_width) + other * hq * shape.vd
    backward = own * hq_away * shape.vd + other * (hq * shape.d + hkv * kv_width)
    return Volume(shape.count(forward), shape.count(backward))


def _taken(heads: HeadSplit, rank: int) -> tuple[int, int]:
    """How many query heads and kv heads a rank takes."""
    (q_start, q_stop), (kv_start, kv_stop) = heads.q[rank], heads.kv[rank]
    return q_stop - q_start, kv_stop - kv_start
