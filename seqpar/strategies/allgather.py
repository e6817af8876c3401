"""All-gather: every rank gathers the keys and values that its rows see, chunk by chunk.

It is the mesh of one column. In order (`plan.invariant`) chunks are runs of positions: keys are walked
downwards as one device does and, for dk and dv, queries upwards, gathered in place of a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import gcd

from jaxtyping import Float
from torch import Tensor

from seqpar.comm import Delivery, Grid, Piece, gather_pass
from seqpar.layout import Layout, held
from seqpar.strategies.blockwise import (
    Gradients,
    Route,
    Visit,
    blockwise_attention,
    learned_elements,
)
from seqpar.strategies.mesh import MeshRoute, spans_of
from seqpar.strategies.plan import Plan, Spans
from seqpar.strategies.volume import Shape, Volume
from seqpar_kernels import Partial, Rows


def allgather_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
    *,
    with_lse: bool = False,  # noqa: ARG001 - it always may be
) -> tuple[Float[Tensor, "b sl hq vd"], Float[Tensor, "b sl hq"]]:
    """(out, lse) of this rank's rows of softmax(q k^T) v. The call has been checked; all ranks must call."""
    route: Route = MeshRoute(plan, column(plan))
    if plan.invariant:
        route = InOrderRoute(plan)
    return blockwise_attention(q, k, v, plan, route, plan.score.resolve(q.shape[-1]), 0)


def allgather_volume(plan: Plan, rank: int, shape: Shape) -> Volume:
    """What `rank` sends: to every rank that sees them, its k and v, for even shards (P-1)/P N 2hk elements.

    Backward the same again, and the sums of dk and dv in float32 or wider for the keys it gathered. In
    order, instead of the sums, (P-1)/P N (2hq + 2nq): q, dout and, in float32, lse and delta.
    """
    if not plan.invariant:
        return MeshRoute(plan, column(plan), rank).volume(shape)
    return InOrderRoute(plan, rank).volume(shape)


def column(plan: Plan) -> Grid:
    """The grid in which all ranks share keys, and each has its own rows."""
    return Grid(plan.group, tuple((rank,) for rank in range(plan.layout.size)))


class InOrderRoute:
    """Own rows; keys from the last to the first, whoever holds them."""

    def __init__(self, plan: Plan, rank: int | None = None) -> None:
        self._plan = plan
        self._rank = plan.group.rank if rank is None else rank
        rows, keys = plan.layout.spans, plan.keys.spans
        size, by_key, by_row = plan.layout.size, runs(plan.keys), runs(plan.layout)
        self._keys = Delivery(
            self._rank, size, len(by_key), lambda n, _: by_key[-1 - n],
            cache(lambda peer, p: plan.sees(rows[peer], spans_of([p], keys))),
        )  # fmt: skip
        self._queries = Delivery(
            self._rank, size, len(by_row), lambda n, _: by_row[n],
            cache(lambda peer, p: plan.sees(spans_of([p], rows), keys[peer])),
        )  # fmt: skip

    @property
    def deliveries(self) -> tuple[Delivery, Delivery]:
        """Of query rows and of keys."""
        return self._queries, self._keys

    def rows(self, q: Tensor) -> tuple[Spans, Tensor]:
        """This rank's own."""
        return self._plan.layout.spans[self._rank], q

    def columns(self, k: Tensor, v: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """A run of positions at a time."""
        for pieces, (k_c, v_c) in gather_pass((k, v), self._keys, self._plan.group):
            yield spans_of(pieces, self._plan.keys.spans), k_c, v_c
            del k_c, v_c  # or three chunks are held while the next but one is begun

    def merged(self, running: Partial) -> Partial:
        """Nobody else worked on these rows."""
        return running

    def visits(self, mine: Rows, k: Tensor, v: Tensor, into: Gradients) -> Iterator[Visit]:
        """Own rows meet the keys downwards; then own keys meet the queries upwards."""
        plan = self._plan
        own, own_keys = plan.layout.spans[self._rank], plan.keys.spans[self._rank]
        into.dq = into.zeros(mine.q)
        for cols, k_c, v_c in self.columns(k, v):
            yield Visit(own, cols, mine, k_c, v_c, into.dq, None, None, into.dslopes)
            del k_c, v_c  # or the last ones live on while queries are walked
        into.dk, into.dv = into.zeros(k), into.zeros(v)
        travelling = mine.q, mine.dout, mine.lse, mine.delta
        for pieces, (q, dout, lse, delta) in gather_pass(travelling, self._queries, plan.group):
            rows = Rows(q, dout, dout, lse, delta, mine.lse_learns)
            spans = spans_of(pieces, plan.layout.spans)
            yield Visit(spans, own_keys, rows, k, v, None, into.dk, into.dv, None)

    def volume(self, shape: Shape) -> Volume:
        """What the rank sends."""
        keys = shape.count(self._keys.gathered_rows * shape.kv)
        rows = self._queries.gathered_rows
        learned = learned_elements(self._plan, self._rank, shape.num_learned, shape.hq)
        backward = (
            keys
            + shape.count(rows * shape.hq * (shape.d + shape.vd))
            + shape.count(rows * shape.hq * 2 + learned, wide=True)
        )
        return Volume(keys, backward)


def runs(layout: Layout) -> list[tuple[Piece, ...]]:
    """About as many runs of positions as ranks, cut where shards are: who holds which part of each."""
    unit = gcd(*(span.start for spans in layout.spans for span in spans)) or max(layout.length, 1)
    run = -(-layout.length // (layout.size * unit)) * unit
    cut: list[list[tuple[int, Piece]]] = [[] for _ in range(-(-layout.length // max(run, 1)))]
    for owner, spans in enumerate(layout.spans):
        for at, span in held(spans):
            for n in range(span.start // run, span.positions[-1] // run + 1):
                first = max(span.start, n * run)
                stop = min(span.start + span.length, (n + 1) * run)
                shift = at.start - span.start
                cut[n].append((first, Piece(owner, first + shift, stop + shift)))
    return [tuple(p for _, p in sorted(x, key=lambda pair: pair[0])) for x in cut]
