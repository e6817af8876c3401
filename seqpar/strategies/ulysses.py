"""Ulysses: trade rows for heads, attend whole sequences on fewer heads, trade back.

The attention in the middle is a ring of its own: of one rank, or, in the hybrid, of the ranks that hold
the rest of the sequence. So this file adds no loop over blocks.
Source: Jacobs et al. 2023, DeepSpeed-Ulysses (arXiv:2309.14509), section 3; with a ring outside, Fang and
Zhao 2024, USP (arXiv:2405.07719).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.comm import Grid, Group, HeadTrade, Places, heads_to_rows, per_query_head, rows_to_heads
from seqpar.layout import HeadSplit, Layout, held, joined, split_heads, whole
from seqpar.strategies.plan import Plan
from seqpar.strategies.ring import ring_attention, ring_volume
from seqpar.strategies.volume import Shape, Volume


def ulysses_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
    *,
    with_lse: bool = False,
) -> tuple[Float[Tensor, "b sl hq vd"], Float[Tensor, "b sl hq"] | None]:
    """(out, lse if asked for) of this rank's rows. The call has been checked; all ranks must call.

    Any head counts: ranges of query heads differ by at most one, a kv head is sent to every rank
    whose query heads need it, and ranks beyond the number of heads attend nothing.
    """
    grid = _grid(plan)
    (i, j), inner = grid.index_of(plan.group.rank), grid.ulysses
    middle, at_q, at_k = _middle(plan, grid)
    heads = split_heads(q.shape[2], k.shape[2], inner.size)
    if inner.size == 1:
        q_h, k_h, v_h = q, k, v
    else:
        repeats = heads.q if plan.invariant and heads.replicates else None
        there = HeadTrade(
            inner, (at_q[i], at_k[i], at_k[i]), (heads.q, heads.kv, heads.kv),
            (heads.hq, heads.hkv, heads.hkv), (None, repeats, repeats),
        )  # fmt: skip
        q_h, k_h, v_h = rows_to_heads((q, k, v), there)

    results = []
    for of_q, of_kv, group in _runs(heads, j, bool(plan.invariant)):
        k_s, v_s = (x[:, :, of_kv] for x in (k_h, v_h))
        if group > 1:
            k_s, v_s = per_query_head(k_s, group), per_query_head(v_s, group)
        first = heads.q[j][0] + of_q.start
        results.append(
            ring_attention(q_h[:, :, of_q], k_s, v_s, middle, with_lse=with_lse, head=first)
        )
    if not results:  # no heads here: the same graph as elsewhere, of empty tensors
        results = [ring_attention(q_h, k_h, v_h, middle, with_lse=with_lse)]
    outs, lses = zip(*results, strict=True)
    ys = [torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]]
    if with_lse:
        ys.append((torch.cat(lses, dim=2) if len(lses) > 1 else lses[0]).unsqueeze(-1))
    if inner.size > 1:
        n = len(ys)
        back = HeadTrade(inner, (at_q[i],) * n, (heads.q,) * n, (heads.hq,) * n, (None,) * n)
        ys = list(heads_to_rows(ys, back))
    return ys[0], ys[1].squeeze(-1) if with_lse else None


def ulysses_volume(plan: Plan, rank: int, shape: Shape) -> Volume:
    """What `rank` sends, in the trades and, in the hybrid, in the ring between.

    Forward, its rows of q, k, v to the ranks that take those heads, and all other rows of its heads
    of out: for even shards and heads (P-1)/P^2 N (2hq + 2hk) elements. Backward the same the other
    way round; with invariant bits, where ranks share a kv head, its gradients once for every query head.
    """
    grid = _grid(plan)
    (i, j), (_, size) = grid.index_of(rank), grid.shape
    middle, _, _ = _middle(plan, grid)
    heads = split_heads(shape.hq, shape.hkv, size)
    kv_width, hq, hkv = shape.d + shape.vd, heads.num_q(j), heads.num_kv(j)
    own_q, own_k = plan.layout.rows[rank], plan.keys.rows[rank]
    other_q, other_k = middle.layout.rows[i] - own_q, middle.keys.rows[i] - own_k
    hq_away = shape.hq - hq
    hkv_away = sum(heads.num_kv(n) for n in range(size) if n != j)
    back = hq if plan.invariant and heads.replicates else hkv
    sent = own_q * hq_away * shape.d + own_k * hkv_away * kv_width + other_q * hq * shape.vd
    returned = own_q * hq_away * shape.vd + other_q * hq * shape.d + other_k * back * kv_width
    forward, backward = shape.count(sent), shape.count(returned)
    if shape.with_lse:
        forward += shape.count(other_q * hq, wide=True)
        backward += shape.count(own_q * hq_away, wide=True)
    for of_q, of_kv, group in _runs(heads, j, bool(plan.invariant)):
        part = replace(shape, hq=length(of_q), hkv=length(of_kv) * group)
        ring = ring_volume(middle, i, part)
        forward, backward = forward + ring.forward, backward + ring.backward
    return Volume(forward, backward)


def _grid(plan: Plan) -> Grid:
    return plan.group.grid(ring=1) if plan.grid is None else plan.grid


def _middle(
    plan: Plan, grid: Grid
) -> tuple[Plan, tuple[tuple[Places, ...], ...], tuple[tuple[Places, ...], ...]]:
    """The plan between the trades, and by ring index and rank where rows of q and of k then are."""
    layout, at_q = _merged(plan.layout, grid.members)
    keys, at_k = _merged(plan.keys, grid.members)
    outer = Group.alone() if grid.shape[0] == 1 else grid.ring
    middle = replace(
        plan,
        group=outer,
        layout=layout,
        kv_layout=keys,
        strategy="ring",
        grid=None,
        invariant=False,
    )
    return middle, at_q, at_k


def _merged(
    layout: Layout, members: Sequence[Sequence[int]]
) -> tuple[Layout, tuple[tuple[Places, ...], ...]]:
    """The layout in which the ranks of each row are one, their rows in the order of positions."""
    if len(members) == 1:
        return whole(layout.length), (tuple(layout.places(rank) for rank in members[0]),)
    all_spans, all_places = [], []
    for ranks in members:
        rows = [
            (span, n, at) for n, rank in enumerate(ranks) for at, span in held(layout.spans[rank])
        ]
        if len(ranks) > 1:
            rows.sort(key=lambda row: row[0].start)
        places: list[list[tuple[slice, slice]]] = [[] for _ in ranks]
        for (place, _), (_, n, at) in zip(held([s for s, _, _ in rows]), rows, strict=True):
            places[n].append((at, place))
        all_spans.append(joined(span for span, _, _ in rows))
        all_places.append(tuple(tuple(p) for p in places))
    merged = Layout(layout.kind, layout.length, len(members), tuple(all_spans))
    return merged, tuple(all_places)


def _runs(heads: HeadSplit, rank: int, in_order: bool) -> Iterator[tuple[slice, slice, int]]:
    """(query heads, kv heads, g): what is attended at once, each kv head for g query heads of its own.

    With g = 1 the heads are grouped as usual. In order, every query head has gradients of k and v of its
    own, and they are added in the order of heads.
    """
    group, count = heads.hq // heads.hkv, heads.num_q(rank)
    if in_order and heads.replicates and count:
        yield slice(0, count), slice(0, count), 1
    elif in_order and group > 1:
        for n in range(heads.num_kv(rank)):
            yield slice(n * group, (n + 1) * group), slice(n, n + 1), group
    elif not (in_order and heads.replicates):
        for s in heads.segments(rank):
            yield s.q, s.kv, 1


def length(s: slice) -> int:
    """Of a slice with a start and a stop."""
    return int(s.stop - s.start)
