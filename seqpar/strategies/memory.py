"""`Memory`: what a strategy's formula says a rank holds, to be compared with what was measured.

Every term names the tensors it counts. A formula is the fullest of a few moments, each a sum of terms:
integers from the plan and the shape, nothing measured. Storage of tensors is counted, not what an
allocator makes of it. The loops over blocks are in `loop_memory`, work space of the CPU op in `temporaries`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from seqpar.comm import Places
from seqpar.strategies.allgather import column
from seqpar.strategies.loop_memory import (
    Middle,
    Sizes,
    Terms,
    fullest,
    gathering_middle,
    in_order_middle,
    ring_middle,
)
from seqpar.strategies.plan import Plan
from seqpar.strategies.ulysses import _cut, _grid, _middle
from seqpar.strategies.volume import Shape


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on one rank: at the fullest moment of forward, between, and of backward.

    The caller's tensors are in it: q, k, v and out throughout, dout in backward.
    """

    forward: Terms
    kept: Terms
    backward: Terms

    @property
    def peak_bytes(self) -> int:
        """Of the fullest moment of a step."""
        return max(sum(self.forward.values()), sum(self.backward.values()))

    @property
    def kept_bytes(self) -> int:
        """From forward to backward, for every layer of a model."""
        return sum(self.kept.values())


def memory(plan: Plan, rank: int, shape: Shape) -> Memory:
    """What `rank` holds in a forward and backward step.

    Args:
        plan: with its implementation resolved. Work space is counted for `aten` on CPU; that of the
            other implementations is of one tile.

    Raises:
        NotImplementedError: heads go in chunks.
    """
    return _FORMULAS[plan.strategy](plan, rank, shape)


def _local(plan: Plan, rank: int, shape: Shape, middle: Middle) -> Memory:
    """Of a strategy that attends from the caller's own q, k and v."""
    of, rows = Sizes(shape), plan.layout.rows[rank]
    own = {"q": of.q(rows), "k, v": of.kv(plan.keys.rows[rank])}
    kept = own | {"out": of.out(rows), "lse": of.statistic(rows)}
    return Memory(own | middle.forward, kept, kept | {"dout": of.out(rows)} | middle.backward)


def _ring(plan: Plan, rank: int, shape: Shape) -> Memory:
    """Own, and: running sums, own parcel until sent, 2 blocks of k, v; backward 2 blocks and 4 sums.

    Even shards of n rows in float32, P > 2, in units of n hq d: forward 3 + 1 + 4, backward 5 + dq 1 +
    k, v 4 + sums of dk, dv 8 (own, worked on, leaving, arriving), and work space.
    """
    return _local(plan, rank, shape, ring_middle(plan, rank, shape))


def _mesh(plan: Plan, rank: int, shape: Shape) -> Memory:
    """R x C, even shards of n rows in float32, units of n hq d (MHA), R > 2.

    Backward 5 + (C > 1) 3 C gathered q, dout, out + dq C + chunks of k, v 4 + sums of dk, dv 2 own,
    2 worked on, 2 leaving, 2 (R-1)/R arriving, and work space.
    """
    assert plan.grid is not None, "checked"
    return _local(plan, rank, shape, gathering_middle(plan, plan.grid, rank, shape))


def _allgather(plan: Plan, rank: int, shape: Shape) -> Memory:
    """The mesh of one column; in order, instead, chunks of keys and then of queries."""
    if plan.invariant:
        return _local(plan, rank, shape, in_order_middle(plan, rank, shape))
    return _local(plan, rank, shape, gathering_middle(plan, column(plan), rank, shape))


def _ulysses(plan: Plan, rank: int, shape: Shape) -> Memory:
    """Own, and q, k, v, out, lse, dout of this rank's heads, and what attends them.

    Even heads in float32, units of n hq d: forward 3 + 3 + 1; backward 5 + 4 + dout 1 + dq, dk, dv 3,
    and work space. The trades: what leaves and what arrives, (P-1)/P of each tensor.
    """
    grid = _grid(plan)
    (i, j), (_, size) = grid.index_of(rank), grid.shape
    cut, (middle, at_q, at_k) = _cut(plan, grid, shape.hq, shape.hkv), _middle(plan, grid)
    if len(cut.q) > 1:
        raise NotImplementedError("the formula is for head_chunks=1; more chunks need less")
    heads = cut.heads
    if size == 1:
        return _local(plan, rank, shape, ring_middle(middle, i, shape))

    hkv = heads.num_q(j) if plan.invariant and heads.replicates else heads.num_kv(j)
    own, here = Sizes(shape), Sizes(replace(shape, hq=heads.num_q(j), hkv=hkv))
    away = Sizes(replace(
        shape, hq=shape.hq - heads.num_q(j),
        hkv=sum(heads.num_kv(n) for n in range(size) if n != j),
    ))  # fmt: skip
    rows, keys = plan.layout.rows[rank], plan.keys.rows[rank]
    all_rows, all_keys = middle.layout.rows[i], middle.keys.rows[i]
    # (all, own) rows that are not sent home from where they lie; then rows that come by a copy.
    copied_q, copied_k = (_scattered(at[i], j, shape.batch) for at in (at_q, at_k))
    far_q, far_k = (_strewn(at[i], j, shape.batch) for at in (at_q, at_k))
    runs = list(cut.runs(0, j, in_order=bool(plan.invariant)))
    shapes = [replace(shape, hq=run.num_q, hkv=run.num_kv) for run in runs]
    attended = [ring_middle(middle, i, of_run, packed=len(runs) > 1) for of_run in shapes]
    done = [Sizes(of_run) for of_run in shapes[1:]]  # the first run is the last in backward

    mine = {"q": own.q(rows), "k, v": own.kv(keys)}
    traded = {"q, k, v of own heads": here.q(all_rows) + here.kv(all_keys)}
    result = {"out, lse of own heads": here.out(all_rows) + here.statistic(all_rows)}
    kept = mine | {"out": own.out(rows)} | traded | result
    dout = {"dout": own.out(rows)}
    brought = {"dout of own heads": here.out(all_rows)}
    forward = [
        mine | traded | {
            "q, k, v leaving": away.q(rows) + away.kv(keys),
            "q, k, v arriving": here.q(far_q) + here.kv(far_k),
        },
        mine | traded | attended[-1].forward | {
            "out, lse of other runs": sum(
                Sizes(x).out(all_rows) + Sizes(x).statistic(all_rows) for x in shapes[:-1]
            ),
        },
        mine | traded | result | {
            "out leaving": here.out(copied_q[0]),
            "out of all runs, side by side": here.out(all_rows) * (len(runs) > 1),
            "out arriving": away.out(rows),
        },
        kept | {"out arriving": away.out(rows), "out of own heads": here.out(copied_q[1])},
    ]  # fmt: skip
    gradients = here.q(all_rows) + here.kv(all_keys)
    copied = here.q(copied_q[0]) + here.kv(copied_k[0])
    arriving = {"dq, dk, dv arriving": away.q(rows) + away.kv(keys)}
    home = mine | {"out": own.out(rows)} | dout | arriving
    backward = [
        kept | dout | brought | {
            "dout leaving": away.out(rows),
            "dout arriving": here.out(far_q),
        },
        kept | dout | brought | attended[-1].backward,
        kept | dout | brought | attended[0].backward | {
            "dq, dk, dv, less out and lse, of other runs": sum(
                x.q(all_rows) + x.kv(all_keys) - x.out(all_rows) - x.statistic(all_rows)
                for x in done
            ),
        },
        home | {"dq, dk, dv of own heads": gradients, "dq, dk, dv leaving": copied},
        home | {
            "dq, dk, dv of own heads": here.q(copied_q[1] or all_rows)
            + here.kv(copied_k[1] or all_keys),
            "dq, dk, dv": own.q(rows) + own.kv(keys, wide=heads.replicates),
        },
    ]  # fmt: skip
    return Memory(fullest(forward), kept, fullest(backward))


def _scattered(places: Sequence[Places], rank: int, batch: int) -> tuple[int, int]:
    """Of how many rows of a trade copies leave, and of how many of this rank's own."""
    copied = [
        sum(_rows(here) for here, _ in p) * (batch > 1 or len(p) > 1 or _has_steps(p))
        for p in places
    ]
    return sum(copied), copied[rank]


def _strewn(places: Sequence[Places], rank: int, batch: int) -> int:
    """How many rows of others are received beside the place where they belong."""
    others = (p for n, p in enumerate(places) if n != rank)
    return sum(sum(_rows(here) for here, _ in p) for p in others if batch > 1 or _has_steps(p))


def _has_steps(places: Places) -> bool:
    return any((there.step or 1) > 1 for _, there in places)


def _rows(s: slice) -> int:
    return int(s.stop - s.start)


def _materialised(plan: Plan, rank: int, shape: Shape) -> Memory:
    """Own, and float32 matrices of hq N M / P scores. What is gathered beside them is not counted.

    By rows and by columns: kept 1 (p); forward 3 (scores, and two in the softmax); backward 4 (p, dp, ds
    and one between).
    """
    of, rows = Sizes(shape), plan.layout.rows[rank]
    num_rows, num_cols = {
        "materialised_rows": (rows, plan.keys.length),
        "materialised_columns": (plan.layout.length, plan.keys.rows[rank]),
        "materialised_depth": (plan.layout.length, plan.keys.length),
    }[plan.strategy]
    matrix = shape.count(shape.hq * num_rows * num_cols, wide=True).bytes
    own = {"q": of.q(rows), "k, v": of.kv(plan.keys.rows[rank])}
    kept = own | {"out": of.out(rows), "p": matrix} | {
        "materialised_rows": {
            "lse": of.statistic(rows),
            "k of all ranks": shape.count(plan.keys.length * shape.hkv * shape.d).bytes,
        },
        "materialised_columns": {
            "lse, of all rows": of.statistic(plan.layout.length),
            "q of all ranks": of.q(plan.layout.length),
        },
        "materialised_depth": {"lse": of.statistic(rows)},
    }[plan.strategy]  # fmt: skip
    return Memory(
        own | {"scores, softmax": 3 * matrix}, kept,
        kept | {"dout": of.out(rows), "dp, ds": 3 * matrix},
    )  # fmt: skip


_FORMULAS: dict[str, Callable[[Plan, int, Shape], Memory]] = {
    "ring": _ring,
    "ulysses": _ulysses,
    "allgather": _allgather,
    "mesh": _mesh,
    "hybrid": _ulysses,
    "materialised_rows": _materialised,
    "materialised_columns": _materialised,
    "materialised_depth": _materialised,
}
