"""Ring attention: queries stay home, key/value blocks make a trip round the ranks that see them.

Contiguous, zigzag, striped and uneven shards differ only in `plan.layout`. Backward, what is smaller
travels: keys and values with the sums of dk and dv, or queries with dout, lse, delta and the sum of dq.
Source: Liu et al. 2023, Ring Attention (arXiv:2310.01889), section 3; that queries may travel backward,
Sun et al. 2024, BurstAttention (arXiv:2403.09347).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from jaxtyping import Float
from torch import Tensor

from seqpar.comm import Count, RingSum, Trip, current_tape, ring_pass
from seqpar.layout import Span
from seqpar.strategies.blockwise import (
    Gradients,
    Visit,
    blockwise_attention,
    learned_elements,
)
from seqpar.strategies.plan import Plan, Spans
from seqpar.strategies.volume import Shape, Volume, needs_out
from seqpar_kernels import (
    Block,
    Implementation,
    Partial,
    Rows,
    attention,
    attention_with_lse,
    recalled,
)


def ring_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
    *,
    with_lse: bool = False,
    head: int = 0,
) -> tuple[Float[Tensor, "b sl hq vd"], Float[Tensor, "b sl hq"]]:
    """(out, lse) of this rank's rows of softmax(q k^T) v. The call has been checked; all ranks must call.

    One rank alone is one block: an op that compilers and checkpointing policies know by name.

    Args:
        with_lse: whether lse may be differentiated.
        head: which of the attention's query heads is the first of q.
    """
    score = plan.score.resolve(q.shape[-1]).of_heads(head, q.shape[2])
    if plan.group.size == 1 and all(len(x.spans[0]) <= 1 for x in (plan.layout, plan.keys)):
        band = plan.mask.band(Span(0, plan.layout.length), Span(0, plan.keys.length))
        first = plan.first_head + head
        block = Block(band, score, head=first, dropout=plan.drops, documents=plan.packed)
        return _attend_alone(q, k, v, block, plan.implementation, with_lse=with_lse)
    return blockwise_attention(q, k, v, plan, RingRoute(plan), score, head)


def _attend_alone(
    q: Tensor, k: Tensor, v: Tensor, block: Block, implementation: Implementation | None, *, with_lse: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tape = current_tape()
    if tape is not None and tape.mode == "play":
        out, lse = tape.take(2)
        return recalled(
            q, k, v, block, (out, lse), lse_learns=with_lse, implementation=implementation
        )
    attend = attention_with_lse if with_lse else attention
    results = attend(q, k, v, block, implementation=implementation)
    if tape is not None:
        tape.keep(results)
    return results


def ring_volume(plan: Plan, rank: int, shape: Shape) -> Volume:
    """What `rank` sends.

    Forward, k and v of every block but the one that the next rank owns: for even shards
    (P-1)/P N 2hk elements. Backward, the same again, and the sums of dk and dv, in float32 or wider,
    for every block but this rank's own: (P-1)/P N 2hk. Where it is fewer bytes, instead q, dout, lse and
    delta, and the sum of dq in float32: (P-1)/P N (3hq + 2nq), and out with kernels that derive delta
    from it. Blocks that a rank does not see are not sent to it. In order (`plan.invariant`) the sums make
    one hop more, with the owner's share.
    """
    if plan.layout.size == 1:
        return Volume()
    trip = key_trip(plan, rank)
    forward = shape.count(shape.kv * trip.passed_rows)
    if queries_travel(plan, shape):
        trip = query_trip(plan, rank)
        backward = travelling_count(plan, shape, trip.passed_rows)
        sums = shape.hq * (shape.d + shape.slopes_learn)
    else:
        backward, sums = forward, shape.kv
    backward += shape.count(sums * trip.summed_rows(in_order=bool(plan.invariant)), wide=True)
    learned = learned_elements(plan, rank, shape.num_learned, shape.hq)
    return Volume(forward, backward + shape.count(learned, wide=True))


class RingRoute:
    """Own rows; keys by `ring_pass`, in the order of the trip."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._own = plan.layout.spans[plan.group.rank]

    def rows(self, q: Tensor) -> tuple[Spans, Tensor]:
        """This rank's own."""
        return self._own, q

    def columns(self, k: Tensor, v: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """Block by block, this rank's first."""
        for owner, block in ring_pass((k, v), key_trip(self._plan), self._plan.group):
            if block is not None:
                k_o, v_o = block
                yield self._plan.keys.spans[owner], k_o, v_o

    def merged(self, running: Partial) -> Partial:
        """Nobody else worked on these rows."""
        return running

    def visits(self, mine: Rows, k: Tensor, v: Tensor, into: Gradients) -> Iterator[Visit]:
        """Keys visit rows, or rows visit keys."""
        shape = Shape.of(mine.q, k, v, slopes_learn=into.dslopes is not None)
        if queries_travel(self._plan, shape):
            return self._rows_visit(mine, k, v, into)
        return self._keys_visit(mine, k, v, into)

    def _keys_visit(self, mine: Rows, k: Tensor, v: Tensor, into: Gradients) -> Iterator[Visit]:
        plan = self._plan
        trip = key_trip(plan)
        sums = RingSum((k, v), trip, plan.group, into.dtype, in_order=bool(plan.invariant))
        into.dq = into.zeros(mine.q)
        for owner, block in ring_pass((k, v), trip, plan.group):
            share = sums.open()
            if block is not None and share is not None:
                (k_o, v_o), (dk_o, dv_o), cols = block, share, plan.keys.spans[owner]
                yield Visit(self._own, cols, mine, k_o, v_o, into.dq, dk_o, dv_o, into.dslopes)
            sums.close()
        into.dk, into.dv = sums.home()

    def _rows_visit(self, mine: Rows, k: Tensor, v: Tensor, into: Gradients) -> Iterator[Visit]:
        plan, own_keys = self._plan, self._plan.keys.spans[self._plan.group.rank]
        trip = query_trip(plan)
        like = (mine.q,) if into.dslopes is None else (mine.q, mine.lse)
        sums = RingSum(like, trip, plan.group, into.dtype, in_order=bool(plan.invariant))
        into.dk, into.dv = into.zeros(k), into.zeros(v)
        out = (mine.out,) if needs_out(plan.implementation) else ()
        travelling = (mine.q, mine.dout, mine.lse, mine.delta, *out)
        for owner, block in ring_pass(travelling, trip, plan.group):
            share = sums.open()
            if block is not None and share is not None:
                q_o, dout_o, lse_o, delta_o, *out_o = block
                rows = Rows(
                    q_o, out_o[0] if out_o else dout_o, dout_o, lse_o, delta_o, mine.lse_learns
                )
                dq_o, *learned_o = share
                at = plan.layout.spans[owner]
                yield Visit(at, own_keys, rows, k, v, dq_o, into.dk, into.dv, *learned_o)
            sums.close()
        into.dq, *learned = sums.home()
        into.dslopes = learned[0] if learned else None


def key_trip(plan: Plan, rank: int | None = None) -> Trip:
    """Keys go to the next rank, so a rank meets them from its own downwards."""
    rows, keys = plan.layout.spans, plan.keys.spans
    wants = cache(lambda visitor, owner: plan.sees(rows[visitor], keys[owner]))
    return Trip(plan.group.rank if rank is None else rank, plan.keys.rows, wants)


def query_trip(plan: Plan, rank: int | None = None) -> Trip:
    """Queries go to the rank before, so a rank's keys meet them from its own upwards."""
    rows, keys = plan.layout.spans, plan.keys.spans
    wants = cache(lambda visitor, owner: plan.sees(rows[owner], keys[visitor]))
    rank = plan.group.rank if rank is None else rank
    return Trip(rank, plan.layout.rows, wants, direction=-1)


def queries_travel(plan: Plan, shape: Shape) -> bool:
    """Whether they are fewer bytes than keys in backward, were everything to be sent everywhere."""
    queries = travelling_count(plan, shape, plan.layout.length)
    queries += shape.count(
        shape.hq * (shape.d + shape.slopes_learn) * plan.layout.length, wide=True
    )
    keys = shape.count(shape.kv * plan.keys.length)
    keys += shape.count(shape.kv * plan.keys.length, wide=True)
    return queries.bytes < keys.bytes


def travelling_count(plan: Plan, shape: Shape, rows: int) -> Count:
    """Query rows and what backward must know of them, without the sums."""
    out = shape.vd if needs_out(plan.implementation) else 0
    narrow = shape.count(shape.hq * (shape.d + shape.vd + out) * rows)
    return narrow + shape.count(2 * shape.hq * rows, wide=True)
