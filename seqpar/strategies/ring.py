"""Ring attention: queries stay, and key/value blocks travel round the ranks that see them (context parallel).

Each rank holds some rows of q, k and v. In P steps it meets every block of keys: its own first, then those of
the ranks before it, while the next block is already on its way. Which rows a rank holds is data
(`plan.layout`), so contiguous, zigzag, striped and uneven shards take the same way through this file.

A causal zigzag ring of three ranks: rank 0 holds runs 0 and 5 of six, rank 1 runs 1 and 4, rank 2 runs
2 and 3, which are neighbours and so one span. The table says in which step a run of query rows (down) meets
a run of keys (across)::

              keys of   rank 0  rank 1  rank 2  rank 2  rank 1  rank 0
              run          0       1       2       3       4       5
    rank 0    rows 0    step 0     .       .       .       .       .
    rank 1    rows 1    step 1  step 0     .       .       .       .
    rank 2    rows 2    step 2  step 1  step 0     .       .       .
    rank 2    rows 3    step 2  step 1  step 0  step 0     .       .
    rank 1    rows 4    step 1  step 0  step 2  step 2  step 0     .
    rank 0    rows 5    step 0  step 2  step 1  step 1  step 2  step 0

Every rank has as many scores in every step: that is what zigzag is for. In its second step, step 1, rank 0
meets the keys of rank 2: its rows 5 see both of their runs, its rows 0 see neither. A rank holds sl rows of
queries and slk of keys; o is the owner of the block at hand::

    q, dq [b sl hq d]    k, dk [b slk hkv d]    v, dv [b slk hkv vd]    out, dout [b sl hq vd]
    forward    k_o, v_o travel
    backward   k_o, v_o travel, and one step behind them the sums of dk_o, dv_o in float32
               or, if that is fewer bytes, q_o, dout_o, lse_o, delta_o and the sum of dq_o

Keys are fewer bytes where query heads share them, rows mostly where each has its own. Rows travel the other
way round: in step t the keys of rank r meet the rows of rank r + t, in step 1 keys of rank 0 rows of rank 1.

Source: Liu et al. 2023, Ring Attention (arXiv:2310.01889), section 3; that queries may travel backward,
Sun et al. 2024, BurstAttention (arXiv:2403.09347).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial

from jaxtyping import Float
from torch import Tensor

from seqpar.comm import RingSchedule, RingSum, current_replay, ring_pass
from seqpar.layout import Layout, meets
from seqpar.strategies.loop import (
    Differentiate,
    Gradients,
    Learned,
    Meeting,
    Sums,
    attend_by,
)
from seqpar.strategies.plan import Plan, Spans
from seqpar.strategies.strategy import Order, Strategy
from seqpar.strategies.travel import row_bytes, row_message, rows_of
from seqpar_kernels import (
    Block,
    Implementation,
    Partial,
    Rows,
    Score,
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
    # docs/design.md: one rank alone calls an op
    if plan.group.size == 1 and _is_one_block(plan, score):
        make = partial(_whole_block, plan, score, head)
        # Tensors of a score may be another view in every call.
        block = make() if score.tensors else plan.own.get(("block", q.shape[-1], head), make)
        return _attend_alone(q, k, v, block, plan.implementation, with_lse=with_lse)
    return attend_by(RingRoute(plan), q, k, v, plan, score, head=head)


def _is_one_block(plan: Plan, score: Score) -> bool:
    """Whether what a rank that is alone attends to is one block, which an op can be told of."""
    # FlexAttention is differentiated by autograd, which does not look into ops.
    if plan.implementation == "flex" or any(t.asks_each for t in (*score.terms, *plan.terms)):
        return False
    runs = (len(layout.spans[0]) for layout in (plan.layout, plan.keys))
    return max(runs) <= 1 and len(plan.masks) == 1 == len(plan.masks[0].layers)


def _whole_block(plan: Plan, score: Score, head: int) -> Block:
    """The one block of a rank that has all positions."""
    (mask,) = plan.masks
    (layer,), (row, col) = mask.layers, mask.shift
    band, head = layer.band(row, col, 1), plan.first_head + head
    return Block(band, score, row, col, head=head, terms=plan.terms)


def _attend_alone(
    q: Tensor, k: Tensor, v: Tensor, block: Block, implementation: Implementation | None, *, with_lse: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # `once` will not do: the op is a node of autograd's graph, which `recalled` makes anew.
    replay = current_replay()
    if replay is not None and replay.mode == "play":
        out, lse = replay.take(2)
        return recalled(
            q, k, v, block, (out, lse), lse_learns=with_lse, implementation=implementation
        )
    attend = attention_with_lse if with_lse else attention
    results = attend(q, k, v, block, implementation=implementation)
    if replay is not None:
        replay.keep(results)
    return results


class RingRoute:
    """The route on which own rows meet keys by `ring_pass`, in the order of the ring."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._own = plan.layout.spans[plan.group.rank]

    def rows(self, q: Tensor) -> tuple[Spans, Tensor]:
        """The query rows of this rank, as they are."""
        return self._own, q

    def columns(self, k: Tensor, v: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """Yields the keys block by block, this rank's first."""
        for owner, block in ring_pass((k, v), _key_schedule(self._plan), self._plan.group):
            if block is not None:
                k_o, v_o = block
                yield self._plan.keys.spans[owner], k_o, v_o

    def merged(self, running: Partial) -> Partial:
        """The partial itself: nobody else worked on these rows."""
        return running

    def backward(
        self, mine: Rows, k: Tensor, v: Tensor, learned: Learned, differentiate: Differentiate
    ) -> Gradients:
        """Keys travel and meet these rows, or rows travel and meet these keys: what is fewer bytes."""
        plan, wide = self._plan, mine.delta.dtype
        row_cost = row_bytes(row_message(mine, plan.implementation))
        row_cost += row_bytes((mine.q, *learned.values()), wide)
        key_cost = row_bytes((k, v)) + row_bytes((k, v), wide)
        # docs/design.md: what is smaller travels backward
        if row_cost * plan.layout.length < key_cost * plan.keys.length:
            return self._rows_travel(mine, k, v, learned, differentiate)
        return self._keys_travel(mine, k, v, learned, differentiate)

    def _keys_travel(
        self, mine: Rows, k: Tensor, v: Tensor, learned: Learned, differentiate: Differentiate
    ) -> Gradients:
        plan, schedule = self._plan, _key_schedule(self._plan)
        sums = RingSum((k, v), schedule, plan.group, in_order=bool(plan.invariant))
        of_q = Sums(mine.q)
        for owner, block in ring_pass((k, v), schedule, plan.group):
            # Sums move in every step, wanted or not, so that ranks stay in step.
            with sums.share() as share:
                # A share that begins holds nothing until it is met: without a block nobody would write it.
                assert (share is None) == (block is None), "blocks and their sums take the same way"
                if block is not None and share is not None:
                    (k_o, v_o), (dk_o, dv_o), cols = block, share, plan.keys.spans[owner]
                    (dq,), begins = of_q.take()
                    first = begins, sums.begins
                    differentiate(
                        Meeting(self._own, cols, mine, k_o, v_o, dq, dk_o, dv_o, learned, first)
                    )
        (dq,), (dk, dv) = of_q.whole(), sums.home()
        return Gradients(dq, dk, dv, learned)

    def _rows_travel(
        self, mine: Rows, k: Tensor, v: Tensor, learned: Learned, differentiate: Differentiate
    ) -> Gradients:
        plan, schedule = self._plan, _row_schedule(self._plan)
        own_keys = plan.keys.spans[plan.group.rank]
        like = (mine.q, *learned.values())
        sums = RingSum(like, schedule, plan.group, in_order=bool(plan.invariant))
        of_kv = Sums(k, v)
        for owner, block in ring_pass(row_message(mine, plan.implementation), schedule, plan.group):
            with sums.share() as share:
                # A share that begins holds nothing until it is met: without a block nobody would write it.
                assert (share is None) == (block is None), "blocks and their sums take the same way"
                if block is not None and share is not None:
                    rows, (dq_o, *by_row) = rows_of(block, lse_learns=mine.lse_learns), share
                    spans, learned_o = plan.layout.spans[owner], _named(learned, by_row)
                    for x in by_row if sums.begins else ():
                        x.zero_()
                    (dk, dv), begins = of_kv.take()
                    first = sums.begins, begins
                    differentiate(
                        Meeting(spans, own_keys, rows, k, v, dq_o, dk, dv, learned_o, first)
                    )
        (dk, dv), (dq, *by_row) = of_kv.whole(), sums.home()
        return Gradients(dq, dk, dv, _named(learned, by_row))


def _named(learned: Learned, tensors: Sequence[Tensor]) -> Learned:
    """Other tensors under the same names."""
    return dict(zip(learned, tensors, strict=True))


def _key_schedule(plan: Plan) -> RingSchedule:
    """Keys go to the next rank, so a rank meets them from its own downwards."""
    rows, keys, masks = plan.layout.spans, plan.keys.spans, plan.masks
    wants = cache(lambda visitor, owner: meets(rows[visitor], keys[owner], *masks))
    make = partial(RingSchedule, plan.group.rank, plan.keys.rows, wants)
    return plan.kept("keys of a ring", make)


def _row_schedule(plan: Plan) -> RingSchedule:
    """Query rows go to the rank before, so a rank's keys meet them from its own upwards."""
    rows, keys, masks = plan.layout.spans, plan.keys.spans, plan.masks
    wants = cache(lambda visitor, owner: meets(rows[owner], keys[visitor], *masks))
    make = partial(RingSchedule, plan.group.rank, plan.layout.rows, wants, direction=-1)
    return plan.kept("rows of a ring", make)


def _out_of_order(plan: Plan) -> str | None:
    """Says why blocks do not arrive in the order of positions, or `None` if they do."""
    layout, keys, causal = plan.layout, plan.keys, all(mask.is_causal for mask in plan.masks)
    # docs/design.md: bits are promised by spans
    if causal and layout.is_in_order and keys.spans == layout.spans:
        return None
    return (
        "a ring gives the same bits for any number of ranks only with a causal mask, a contiguous "
        f"layout and keys of the same layout, got {causal=}, {_told(layout)} and keys {_told(keys)}; "
        "'ulysses' and 'allgather' take any layout"
    )


def _told(layout: Layout) -> str:
    return layout.kind if layout.is_in_order or layout.kind != "contiguous" else "not contiguous"


RING = Strategy("ring", ring_attention, order=Order(_out_of_order))
