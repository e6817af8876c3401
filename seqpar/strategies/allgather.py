"""All-gather: every rank gathers the keys and values that its rows see, chunk by chunk.

It is the mesh of one column. Three ranks meet the keys in turns, so that all links are in use::

              chunk 0   chunk 1   chunk 2
    rank 0    keys 0    keys 2    keys 1
    rank 1    keys 1    keys 0    keys 2        k_c, v_c [b slk hkv w], of which two are held at a time
    rank 2    keys 2    keys 1    keys 0

In order (`plan.invariant`) chunks are runs of positions, the same for all ranks. Keys are walked downwards,
as one device does. For dk and dv queries are then walked upwards, gathered in place of a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from math import gcd

from jaxtyping import Float
from torch import Tensor

from seqpar.comm import GatherSchedule, Grid, Group, Piece, gather_pass
from seqpar.layout import Layout, held, meets
from seqpar.strategies.loop import (
    Differentiate,
    Gradients,
    Learned,
    Meeting,
    Route,
    Sums,
    attend_by,
)
from seqpar.strategies.mesh import MeshRoute, spans_by_chunk, spans_of
from seqpar.strategies.plan import Plan, Spans
from seqpar.strategies.strategy import Order, Strategy
from seqpar.strategies.travel import row_message, rows_of
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
    # docs/design.md: the all-gather is the mesh of one column
    route: Route = (
        InOrderRoute(plan) if plan.invariant else MeshRoute(plan, partial(column, plan.group))
    )
    return attend_by(route, q, k, v, plan, plan.score.resolve(q.shape[-1]))


def column(group: Group) -> Grid:
    """The grid in which all ranks share keys, and each has its own rows."""
    return Grid(group, tuple((rank,) for rank in range(group.size)))


class InOrderRoute:
    """The route of invariant bits: own rows meet keys from the last to the first, whoever holds them."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._rank = plan, plan.group.rank
        tables = plan.kept("all-gather in order", partial(_in_order, plan))
        self._keys, self._key_spans, self._queries, self._row_spans = tables

    def rows(self, q: Tensor) -> tuple[Spans, Tensor]:
        """The query rows of this rank, as they are."""
        return self._plan.layout.spans[self._rank], q

    def columns(self, k: Tensor, v: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """Yields the keys of one run of positions after another."""
        chunks = gather_pass((k, v), self._keys, self._plan.group)
        for spans, (_, (k_c, v_c)) in zip(self._key_spans, chunks, strict=True):
            yield spans, k_c, v_c
            del k_c, v_c  # or three chunks are held while the next but one is begun

    def merged(self, running: Partial) -> Partial:
        """The partial itself: nobody else worked on these rows."""
        return running

    def backward(
        self, mine: Rows, k: Tensor, v: Tensor, learned: Learned, differentiate: Differentiate
    ) -> Gradients:
        """Own rows meet the keys downwards; then own keys meet the queries upwards."""
        plan = self._plan
        own, own_keys = plan.layout.spans[self._rank], plan.keys.spans[self._rank]
        of_q, of_kv = Sums(mine.q), Sums(k, v)
        for cols, k_c, v_c in self.columns(k, v):
            (dq,), begins = of_q.take()
            met = Meeting(own, cols, mine, k_c, v_c, dq, None, None, learned, (begins, False))
            differentiate(met)
            del k_c, v_c, met  # or the last ones live on while queries are walked
        travelling = row_message(mine, plan.implementation)
        chunks = gather_pass(travelling, self._queries, plan.group)
        for spans, (_, message) in zip(self._row_spans, chunks, strict=True):
            rows = rows_of(message, lse_learns=mine.lse_learns)
            (dk, dv), begins = of_kv.take()
            differentiate(Meeting(spans, own_keys, rows, k, v, None, dk, dv, {}, (False, begins)))
        (dq,), (dk, dv) = of_q.whole(), of_kv.whole()
        return Gradients(dq, dk, dv, learned)


def _in_order(plan: Plan) -> tuple[GatherSchedule, list[Spans], GatherSchedule, list[Spans]]:
    """The tables of the keys, walked downwards, and of the queries, upwards; of each positions by chunk."""
    rows, keys, masks = plan.layout.spans, plan.keys.spans, plan.masks
    rank, size = plan.group.rank, plan.group.size
    sees_keys = cache(lambda peer, p: meets(rows[peer], spans_of([p], keys), *masks))
    sees_rows = cache(lambda peer, p: meets(spans_of([p], rows), keys[peer], *masks))
    of_keys = GatherSchedule.together(rank, size, runs(plan.keys)[::-1], sees_keys)
    of_rows = GatherSchedule.together(rank, size, runs(plan.layout), sees_rows)
    return of_keys, spans_by_chunk(of_keys, keys), of_rows, spans_by_chunk(of_rows, rows)


def runs(layout: Layout) -> list[tuple[Piece, ...]]:
    """Cuts positions, where shards are cut, into about as many runs as ranks; gives the pieces of each."""
    # Where the only shard begins at 0, there is nothing to cut at, and one run.
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


ALLGATHER = Strategy("allgather", allgather_attention, order=Order())
