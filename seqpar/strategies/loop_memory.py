"""What the loops over blocks hold beside the q, k, v, out, lse and dout they are given, see `memory`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from seqpar.comm import Delivery, Grid, Trip
from seqpar.layout import Span
from seqpar.strategies.allgather import InOrderRoute
from seqpar.strategies.mesh import MeshRoute, spans_of
from seqpar.strategies.plan import Plan
from seqpar.strategies.ring import key_trip, queries_travel, query_trip, travelling_count
from seqpar.strategies.temporaries import backward_bytes, forward_bytes
from seqpar.strategies.volume import Shape

Terms = dict[str, int]  # which tensors -> bytes


@dataclass(frozen=True)
class Middle:
    """Of attention between given q, k, v, out, lse and dout, which are not in it."""

    forward: Terms
    backward: Terms


@dataclass(frozen=True)
class Sizes:
    """Bytes of the tensors of so many rows."""

    shape: Shape

    def q(self, rows: int, *, wide: bool = False) -> int:
        """Also dq."""
        return self.shape.count(rows * self.shape.hq * self.shape.d, wide=wide).bytes

    def out(self, rows: int) -> int:
        """Also dout."""
        return self.shape.count(rows * self.shape.hq * self.shape.vd).bytes

    def kv(self, rows: int, *, wide: bool = False) -> int:
        """K and v, or dk and dv."""
        return self.shape.count(rows * self.shape.kv, wide=wide).bytes

    def statistic(self, rows: int, count: int = 1) -> int:
        """lse, delta, maxima or sums: one number for each row and head."""
        return self.shape.count(count * rows * self.shape.hq, wide=True).bytes

    def running(self, rows: int) -> int:
        """acc, m and l."""
        return self.shape.count(rows * self.shape.hq * (self.shape.vd + 2), wide=True).bytes


def fullest(moments: Iterator[Terms] | Sequence[Terms]) -> Terms:
    """The moment with most bytes, without what is not there."""
    most = max(moments, key=lambda terms: sum(terms.values()))
    return {name: size for name, size in most.items() if size}


def ring_middle(plan: Plan, rank: int, shape: Shape, *, packed: bool = False) -> Middle:
    """Of `ring_attention`; `packed` if dout is part of a wider tensor."""
    if plan.layout.size == 1 and all(len(x.spans[0]) <= 1 for x in (plan.layout, plan.keys)):
        return _alone(plan, shape, packed)
    forward = fullest(list(_ring_forward(plan, rank, shape)))
    visits = _rows_visit if queries_travel(plan, shape) else _keys_visit
    return Middle(forward, fullest(list(visits(plan, rank, shape, packed))))


def _ring_forward(plan: Plan, rank: int, shape: Shape) -> Iterator[Terms]:
    of, trip, own = Sizes(shape), key_trip(plan, rank), plan.layout.spans[rank]
    for step in range(trip.size):
        keys = plan.keys.spans[trip.at(-step)]
        yield {
            "acc, m, l": of.running(plan.layout.rows[rank]),
            **_parcels(trip, step, of.kv, "k, v"),
            "work space": forward_bytes(plan, own, keys, shape),
        }


def _keys_visit(plan: Plan, rank: int, shape: Shape, packed: bool) -> Iterator[Terms]:
    of, trip, rows = Sizes(shape), key_trip(plan, rank), plan.layout.rows[rank]
    own = plan.layout.spans[rank]
    for step in range(trip.size):
        keys = plan.keys.spans[trip.at(-step)]
        yield {
            "delta": of.statistic(rows),
            "dq": of.q(rows, wide=True),
            **_parcels(trip, step, of.kv, "k, v"),
            **_sums(trip, step, lambda n: of.kv(n, wide=True), "dk, dv", bool(plan.invariant)),
            "work space": backward_bytes(plan, own, keys, shape, packed=packed),
        }


def _rows_visit(plan: Plan, rank: int, shape: Shape, packed: bool) -> Iterator[Terms]:
    of, trip = Sizes(shape), query_trip(plan, rank)
    rows, own_keys = plan.layout.rows[rank], plan.keys.spans[rank]

    def sums(n: int) -> int:
        return of.q(n, wide=True) + of.statistic(n) * shape.slopes_learn

    def travelling(n: int) -> int:
        return travelling_count(plan, shape, n).bytes

    for step in range(trip.size):
        owner = trip.at(-step)
        met = plan.layout.spans[owner]
        yield {
            "delta": of.statistic(rows),
            "dk, dv": of.kv(plan.keys.rows[rank], wide=True),
            **_parcels(trip, step, travelling, "q, dout, out, lse, delta"),
            **_sums(trip, step, sums, "dq", bool(plan.invariant)),
            "work space": backward_bytes(
                plan, met, own_keys, shape, packed=packed or owner != rank
            ),
        }


def _parcels(trip: Trip, step: int, size: Callable[[int], int], what: str) -> Terms:
    """Of a `ring_pass` while the block of a step is worked on."""
    rank = trip.rank
    last_far = max((s for s in range(trip.size - 1) if trip.goes_far(s)), default=0)
    buffers = {
        s % 2
        for s in range(min(step + 1, trip.size - 1))
        if trip.visits(rank, trip.at(-s - 1))
    }  # fmt: skip
    return {
        f"{what}: own parcel": size(trip.rows[rank]) * (trip.is_awaited() and step <= last_far),
        f"{what}: buffers": size(max(trip.rows)) * len(buffers),
    }


def _sums(
    trip: Trip, step: int, size: Callable[[int], int], what: str, in_order: bool
) -> Terms:  # fmt: skip
    """Of a `RingSum` while this rank adds to the share of a step."""
    rank, before = trip.rank, step - 1
    owner, last_owner = trip.at(-step), trip.at(-before)

    def comes_home(s: int) -> bool:
        return s > 0 and trip.visits(trip.at(s), rank) and not trip.visits(trip.at(s + 1), rank)

    def wanted(o: int) -> bool:
        return o == rank or trip.visits(rank, o)

    begins = in_order and trip.visits(trip.at(1), rank)  # the own share travels
    is_here = any(comes_home(s) for s in range(step)) if begins else step > 0
    terms = {
        f"{what}: sum of own rows": size(trip.rows[rank]) * is_here,
        f"{what}: sum worked on": size(trip.rows[owner]) * wanted(owner),
    }
    if step and not (in_order and wanted(owner)):  # in order, all is waited for first
        left = last_owner != rank and wanted(last_owner)
        arrives = wanted(owner) and trip.at(-1) != owner and trip.follows(rank, owner)
        terms |= {
            f"{what}: sum leaving": size(trip.rows[last_owner]) * left,
            f"{what}: sum arriving": size(trip.rows[owner]) * (arrives and not in_order)
            + size(trip.rows[rank]) * (comes_home(before) and not begins),
        }
    return terms


def _alone(plan: Plan, shape: Shape, packed: bool) -> Middle:
    """One block on one rank: the sums, and the gradients before they have the type of the tensors."""
    of, rows, keys = Sizes(shape), plan.layout.length, plan.keys.length
    spans = plan.layout.spans[0], plan.keys.spans[0]
    forward = {
        "acc, m, l": of.running(rows),
        "work space": forward_bytes(plan, *spans, shape),
    }
    sums = {
        "delta, zeros for the gradient of lse": of.statistic(rows, 2),
        "dq, dk, dv": of.q(rows, wide=True) + of.kv(keys, wide=True),
    }
    cast = 0 if of.q(1, wide=True) == of.q(1) else of.q(rows) + of.kv(keys)
    moments = (
        sums | {"work space": backward_bytes(plan, *spans, shape, packed=packed)},
        sums | {"dq, dk, dv in the type of q": cast},
    )
    return Middle(forward, fullest(moments))


def gathering_middle(plan: Plan, grid: Grid, rank: int, shape: Shape) -> Middle:
    """Of the mesh: rows gathered in a grid row, keys chunk by chunk in a grid column."""
    of = Sizes(shape)
    rows, cols = MeshRoute(plan, grid, rank).deliveries
    i, j = grid.index_of(rank)
    row_spans = [plan.layout.spans[r] for r in grid.members[i]]
    col_spans = [plan.keys.spans[members[j]] for members in grid.members]
    own, alone = plan.layout.rows[rank], rows.size == 1
    met = row_spans[0] if alone else spans_of([p for p, _ in rows.received(0)], row_spans)
    count = own if alone else _received(rows, 0)
    returned = sum(p.length for _, p in rows.sent(0))
    gathered = 0 if alone else travelling_count(plan, shape, count).bytes
    gathered_q = 0 if alone else of.q(count)

    def chunk(n: int) -> Terms:
        later = any(cols.sent(m) for m in range(n + 1, cols.num_chunks))
        return {
            "k, v: chunk met": of.kv(_received(cols, n)),
            "k, v: chunk arriving": of.kv(_received(cols, n + 1)),
            "k, v: own, still to be sent": of.kv(plan.keys.rows[rank]) * (n > 0 and later),
        }

    def keys(n: int) -> tuple[Span, ...]:
        return spans_of([p for p, _ in cols.received(n)], col_spans)

    def forward() -> Iterator[Terms]:
        running = {"q gathered": gathered_q, "acc, m, l": of.running(count)}
        for n in range(cols.num_chunks):
            yield running | chunk(n) | {"work space": forward_bytes(plan, met, keys(n), shape)}
        if not alone:
            yield running | {
                "acc, m, l: parcel": of.running(count),
                "acc, m, l: shares of own rows": of.running(returned),
                "acc, m, l: shares to merge": of.running(returned + own * bool(count)),
            }

    def backward() -> Iterator[Terms]:
        sums = {
            "delta": of.statistic(own),
            "q, dout, out, lse, delta gathered": gathered,
            "dq": of.q(count, wide=True),
            "dk, dv: sum of own rows": of.kv(plan.keys.rows[rank], wide=True),
        }
        for n in range(cols.num_chunks):
            yield (
                sums
                | chunk(n)
                | {
                    "dk, dv: sum worked on": of.kv(_received(cols, n), wide=True),
                    "dk, dv: sum leaving": of.kv(_received(cols, n - 1), wide=True),
                    "dk, dv: shares arriving": of.kv(_sent(cols, n - 1), wide=True),
                    "work space": backward_bytes(plan, met, keys(n), shape, packed=not alone),
                }
            )
        if not alone:
            last = cols.num_chunks - 1
            yield sums | {
                "k, v: chunk met": of.kv(_received(cols, last)),
                "dk, dv: sum worked on": of.kv(_received(cols, last), wide=True),
                "dq: parcel": of.q(count, wide=True),
                "dq: of own rows, and shares": of.q(own + returned, wide=True),
            }

    return Middle(fullest(list(forward())), fullest(list(backward())))


def in_order_middle(plan: Plan, rank: int, shape: Shape) -> Middle:
    """Of all-gather in order: chunks of keys, then of queries."""
    of, own = Sizes(shape), plan.layout.rows[rank]
    queries, keys = InOrderRoute(plan, rank).deliveries
    running = {"acc, m, l": of.running(own)}
    sums = {"delta": of.statistic(own), "dq": of.q(own, wide=True)}
    queries_plan = replace(plan, implementation="reference")  # no kernel is told `out`

    def two(delivery: Delivery, n: int, size: Callable[[int], int]) -> int:
        return size(_received(delivery, n)) + size(_received(delivery, n + 1))

    def travelling(n: int) -> int:
        return travelling_count(queries_plan, shape, n).bytes

    met = [two(keys, n, of.kv) for n in range(keys.num_chunks)]
    backward = [sums | {"k, v: chunks": chunks} for chunks in met]
    sums = sums | {"dk, dv": of.kv(plan.keys.rows[rank], wide=True)}
    for n in range(queries.num_chunks):
        backward.append(sums | {"q, dout, lse, delta: chunks": two(queries, n, travelling)})
    return Middle(running | {"k, v: chunks": max(met)}, fullest(backward))


def _received(delivery: Delivery, n: int) -> int:
    """Rows of a chunk on this rank, none of one that is not there."""
    if not 0 <= n < delivery.num_chunks:
        return 0
    return sum(p.length for p, _ in delivery.received(n))


def _sent(delivery: Delivery, n: int) -> int:
    if not 0 <= n < delivery.num_chunks:
        return 0
    return sum(p.length for _, p in delivery.sent(n))
