"""The mesh: the score matrix in R x C tiles, one for each rank, as in a blocked matrix product.

Queries are gathered among the C ranks of a grid row, keys and values, in chunks, among the R ranks of a
grid column; partial outputs are merged at home. With C = 1 this is the all-gather strategy, with R = 1 its
query-side dual. Striped layouts make all causal tiles equal. The decomposition is that of SUMMA, van de
Geijn and Watts 1997, of a product that is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

from jaxtyping import Float
from torch import Tensor

from seqpar.comm import Delivery, Grid, HomeSum, Piece, gather_pass, send_home
from seqpar.layout import Span, held, joined, part
from seqpar.strategies.blockwise import Gradients, Visit, blockwise_attention
from seqpar.strategies.plan import Plan, Spans
from seqpar.strategies.volume import Shape, Volume, needs_out
from seqpar_kernels import Partial, Rows

MOST_PIECES = 4  # of a rank's rows: messages to another rank in one batch


def mesh_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
    *,
    with_lse: bool = False,  # noqa: ARG001 - it always may be
) -> tuple[Float[Tensor, "b sl hq vd"], Float[Tensor, "b sl hq"]]:
    """(out, lse) of this rank's rows of softmax(q k^T) v. The call has been checked; all ranks must call."""
    assert plan.grid is not None, "checked"
    route = MeshRoute(plan, plan.grid)
    return blockwise_attention(q, k, v, plan, route, plan.score.resolve(q.shape[-1]), 0)


def mesh_volume(plan: Plan, rank: int, shape: Shape) -> Volume:
    """What `rank` sends: for even shards (N/P) [(C-1)(2hq + 2nq) + (R-1) 2hk] elements forward.

    Backward (N/P) [(C-1)(3hq + 2nq) + (R-1) 4hk]. With kernels that derive delta from out, out too. What
    goes home goes as float32 or wider. Nothing is sent to a rank that sees nothing of it.
    """
    assert plan.grid is not None, "checked"
    return MeshRoute(plan, plan.grid, rank).volume(shape)


class MeshRoute:
    """The query rows of a grid row; the keys of a grid column, chunk by chunk."""

    def __init__(self, plan: Plan, grid: Grid, rank: int | None = None) -> None:
        rank = plan.group.rank if rank is None else rank
        self._plan, self._grid = plan, grid
        i, j = grid.index_of(rank)
        row, col = grid.members[i], [members[j] for members in grid.members]
        self._row_spans = [plan.layout.spans[r] for r in row]
        self._col_spans = [plan.keys.spans[r] for r in col]
        keys = [
            tuple(s for m in grid.members for s in plan.keys.spans[m[n]]) for n in range(len(row))
        ]
        queries = [tuple(s for r in m for s in plan.layout.spans[r]) for m in grid.members]
        rows = tuple(Piece(n, 0, length) for n, length in enumerate(lengths(self._row_spans)))
        self._rows = Delivery(
            j, len(row), 1, lambda *_: rows,
            cache(lambda peer, p: plan.sees(self._row_spans[p.owner], keys[peer])),
        )  # fmt: skip
        blocks = [pieces(owner, spans) for owner, spans in enumerate(self._col_spans)]
        self._cols = Delivery.in_turn(
            i,
            blocks,
            cache(lambda peer, p: plan.sees(queries[peer], spans_of([p], self._col_spans))),
        )

    @property
    def deliveries(self) -> tuple[Delivery, Delivery]:
        """Of query rows in the grid row, in one chunk, and of keys in the grid column."""
        return self._rows, self._cols

    def rows(self, q: Tensor) -> tuple[Spans, Tensor]:
        """Those of the grid row."""
        spans, (gathered,) = self._gather_rows((q,))
        return spans, gathered

    def columns(self, k: Tensor, v: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """One rank's keys at a time, this rank's first."""
        for came, (k_c, v_c) in gather_pass((k, v), self._cols, self._grid.ring):
            yield spans_of(came, self._col_spans), k_c, v_c
            del k_c, v_c  # or three chunks are held while the next but one is begun

    def merged(self, running: Partial) -> Partial:
        """This rank's rows of the partials of its grid row, merged in the order of ranks."""
        if self._rows.size == 1:
            return running
        parts = send_home((running.acc, running.m, running.l), self._rows, self._grid.ulysses)
        if not parts:  # no rows here
            return running[slice(0, 0)]
        total, *others = (Partial(*(x.contiguous() for x in part)) for _, part in parts)
        for other in others:
            total.absorb_(other)
        return total

    def visits(self, mine: Rows, k: Tensor, v: Tensor, into: Gradients) -> Iterator[Visit]:
        """The rows of the grid row, gathered once, meet the keys chunk by chunk."""
        spans, rows, dq, dslopes = self._gather_backward(mine, into)
        sums = HomeSum((k, v), self._cols, self._grid.ring, into.dtype)
        for came, (k_c, v_c) in gather_pass((k, v), self._cols, self._grid.ring):
            cols = spans_of(came, self._col_spans)
            dk_c, dv_c = sums.open()
            yield Visit(spans, cols, rows, k_c, v_c, dq, dk_c, dv_c, dslopes)
            del k_c, v_c, dk_c, dv_c  # as in `columns`
            sums.close()
        into.dk, into.dv = sums.home()
        if self._rows.size == 1:
            into.dq = dq
        else:
            into.dq = into.zeros(mine.q)
            total = (into.dq,) if into.dslopes is None else (into.dq, into.dslopes)
            share = (dq,) if dslopes is None else (dq, dslopes)
            for _, parts in send_home(share, self._rows, self._grid.ulysses):
                for x, y in zip(total, parts, strict=True):
                    x += y

    def volume(self, shape: Shape) -> Volume:
        """What the rank sends."""
        rows, cols = self._rows, self._cols
        out = shape.vd if needs_out(self._plan.implementation) else 0
        keys = shape.count(cols.gathered_rows * shape.kv)
        forward = (
            keys
            + shape.count(rows.gathered_rows * shape.hq * shape.d)
            + shape.count(rows.returned_rows * shape.hq * (shape.vd + 2), wide=True)
        )
        backward = (
            keys
            + shape.count(rows.gathered_rows * shape.hq * (shape.d + shape.vd + out))
            + shape.count(rows.gathered_rows * shape.hq * 2, wide=True)
            + shape.count(rows.returned_rows * shape.hq * (shape.d + shape.slopes_learn), wide=True)
            + shape.count(cols.returned_rows * shape.kv, wide=True)
        )
        return Volume(forward, backward)

    def _gather_rows(self, block: tuple[Tensor, ...]) -> tuple[Spans, tuple[Tensor, ...]]:
        if self._rows.size == 1:
            return self._row_spans[0], block
        ((came, gathered),) = gather_pass(block, self._rows, self._grid.ulysses)
        return spans_of(came, self._row_spans), gathered

    def _gather_backward(
        self, mine: Rows, into: Gradients
    ) -> tuple[Spans, Rows, Tensor, Tensor | None]:
        """The rows of the grid row, and zeros for their dq and dslopes."""
        if self._rows.size == 1:
            return self._row_spans[0], mine, into.zeros(mine.q), into.dslopes
        own_out = (mine.out,) if needs_out(self._plan.implementation) else ()
        block = (mine.q, mine.dout, mine.lse, mine.delta, *own_out)
        spans, (q, dout, lse, delta, *out) = self._gather_rows(block)
        rows = Rows(q, out[0] if out else dout, dout, lse, delta, mine.lse_learns)
        return spans, rows, into.zeros(q), None if into.dslopes is None else into.zeros(lse)


def lengths(spans: Sequence[Spans]) -> list[int]:
    """How many positions each has."""
    return [sum(span.length for span in each) for each in spans]


def pieces(owner: int, spans: Spans) -> tuple[Piece, ...]:
    """A rank's rows in slices, so that what nobody sees is not sent: each span in as many as there may be."""
    each = MOST_PIECES // len(spans) if spans else 0
    if each == 0:
        return (Piece(owner, 0, lengths([spans])[0]),)
    cuts = [
        (at.start + span.length * n // each, at.start + span.length * (n + 1) // each)
        for at, span in held(spans)
        for n in range(each)
    ]
    return tuple(Piece(owner, start, stop) for start, stop in cuts if start < stop)


def spans_of(pieces: Sequence[Piece], spans: Sequence[Spans]) -> tuple[Span, ...]:
    """The positions of pieces that are held one after the other."""
    return joined(s for p in pieces for s in part(spans[p.owner], p.rows))
