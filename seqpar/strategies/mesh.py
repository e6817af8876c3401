"""The mesh: the score matrix in R x C tiles, one for each rank, as in a blocked matrix product.

Queries are gathered among the C ranks of a grid row, keys and values, in chunks, among the R ranks of a
grid column; partial outputs are merged at home. With C = 1 this is the all-gather strategy, with R = 1 its
query-side dual. Six ranks in a grid of R = 3 rows and C = 2 columns, ranks 0 and 1 in the first row::

                       keys of
                       ranks 0, 2, 4   ranks 1, 3, 5
    rows of 0 and 1    rank 0          rank 1            0 and 1 exchange q, and partial (acc, m, l)
    rows of 2 and 3    rank 2          rank 3            0, 2 and 4 exchange k and v
    rows of 4 and 5    rank 4          rank 5

Shapes, of even shards of sl rows::

    gathered rows   q [b C*sl hq d], in backward dout, lse and delta too   in a grid row, once
    gathered keys   k, v [b slk hkv w], one rank's at a time               in a grid column, R times
    sent home       acc, m, l of C*sl rows; backward dq, and dk, dv of each chunk

Under a causal mask a zigzag layout gives every tile of the mesh as many scores, whatever the grid: rows of
one rank see as many keys of any other rank as of their own. Hardly any tile is half empty then; in a striped
layout all are. The decomposition is that of SUMMA, van de Geijn and Watts 1997,
of a product that is never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from seqpar.comm import GatherSchedule, Grid, Group, HomeSum, Piece, gather_pass, send_home
from seqpar.layout import Span, held, joined, meets, part
from seqpar.strategies.loop import (
    Differentiate,
    Gradients,
    Learned,
    Meeting,
    Sums,
    attend_by,
    zeros_for,
)
from seqpar.strategies.plan import Plan, Spans
from seqpar.strategies.strategy import Strategy
from seqpar.strategies.travel import row_message, rows_of
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
    grid = plan.grid
    route = MeshRoute(plan, lambda: grid)
    return attend_by(route, q, k, v, plan, plan.score.resolve(q.shape[-1]))


class MeshRoute:
    """The route on which the query rows of a grid row meet the keys of a grid column, chunk by chunk.

    Args:
        grid: makes the grid, for the first call of its kind.
    """

    def __init__(self, plan: Plan, grid: Callable[[], Grid]) -> None:
        self._plan = plan
        tables = plan.kept("mesh", lambda: _tables(plan, grid()), plan.strategy)
        self._in_row, self._in_column = tables.in_row, tables.in_column or plan.group
        self._rows, self._cols = tables.rows, tables.cols
        self._row_spans, self._chunk_spans = tables.row_spans, tables.chunk_spans

    def rows(self, q: Tensor) -> tuple[Spans, Tensor]:
        """Gathers the query rows of the grid row."""
        spans, (gathered,) = self._gather_rows((q,))
        return spans, gathered

    def columns(self, k: Tensor, v: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """Yields the keys of one rank after another, this rank's first."""
        chunks = gather_pass((k, v), self._cols, self._in_column)
        for spans, (_, (k_c, v_c)) in zip(self._chunk_spans, chunks, strict=True):
            yield spans, k_c, v_c
            del k_c, v_c  # or three chunks are held while the next but one is begun

    def merged(self, running: Partial) -> Partial:
        """Merges, in the order of ranks, the partials that its grid row has of this rank's rows."""
        if self._rows.size == 1:
            return running
        parts = send_home((running.acc, running.m, running.l), self._rows, self._in_row)
        if not parts:  # no rows here
            return running[slice(0, 0)]
        total, *others = (Partial(*(x.contiguous() for x in part)) for _, part in parts)
        for other in others:
            total.absorb_(other)
        return total

    def backward(
        self, mine: Rows, k: Tensor, v: Tensor, learned: Learned, differentiate: Differentiate
    ) -> Gradients:
        """The rows of the grid row, gathered once, meet the keys chunk by chunk."""
        spans, rows = self._gather_backward(mine)
        alone = self._rows.size == 1
        of_q = Sums(rows.q)
        by_row = learned if alone else {name: zeros_for(rows.lse) for name in learned}
        sums = HomeSum((k, v), self._cols, self._in_column)
        chunks = gather_pass((k, v), self._cols, self._in_column)
        for cols, (_, (k_c, v_c)) in zip(self._chunk_spans, chunks, strict=True):
            with sums.share() as (dk_c, dv_c):
                (dq,), begins = of_q.take()
                met = Meeting(spans, cols, rows, k_c, v_c, dq, dk_c, dv_c, by_row, (begins, True))
                differentiate(met)
                del k_c, v_c, dk_c, dv_c, met  # as in `columns`
        (dq,), (dk, dv) = of_q.whole(), sums.home()
        if alone:
            return Gradients(dq, dk, dv, learned)
        total = zeros_for(mine.q)
        totals, shares = (total, *learned.values()), (dq, *by_row.values())
        for _, parts in send_home(shares, self._rows, self._in_row):
            for x, share in zip(totals, parts, strict=True):
                x += share
        return Gradients(total, dk, dv, learned)

    def _gather_rows(self, block: tuple[Tensor, ...]) -> tuple[Spans, tuple[Tensor, ...]]:
        if self._rows.size == 1:
            return self._row_spans[0], block
        ((came, gathered),) = gather_pass(block, self._rows, self._in_row)
        return spans_of(came, self._row_spans), gathered

    def _gather_backward(self, mine: Rows) -> tuple[Spans, Rows]:
        """Gathers the rows of the grid row, with all that backward needs of them."""
        if self._rows.size == 1:
            return self._row_spans[0], mine
        spans, message = self._gather_rows(row_message(mine, self._plan.implementation))
        return spans, rows_of(message, lse_learns=mine.lse_learns)


class _Tables(NamedTuple):
    """Who gathers which rows in a rank's grid row, and which keys in its column.

    Args:
        in_column: `None` where it is all ranks in their order: what a group keeps must not refer to it.
        row_spans: the positions of rows, by rank.
        chunk_spans: the positions of keys, by chunk.
    """

    in_row: Group
    in_column: Group | None
    rows: GatherSchedule
    cols: GatherSchedule
    row_spans: list[Spans]
    chunk_spans: list[Spans]


def _tables(plan: Plan, grid: Grid) -> _Tables:
    # docs/design.md: the mesh wants a zigzag layout
    masks = plan.masks
    i, j = grid.index_of(plan.group.rank)
    row, col = grid.members[i], [members[j] for members in grid.members]
    row_spans = [plan.layout.spans[r] for r in row]
    col_spans = [plan.keys.spans[r] for r in col]
    keys = [tuple(s for m in grid.members for s in plan.keys.spans[m[n]]) for n in range(len(row))]
    queries = [tuple(s for r in m for s in plan.layout.spans[r]) for m in grid.members]
    gathered = tuple(Piece(n, 0, length) for n, length in enumerate(lengths(row_spans)))
    blocks = [pieces(owner, spans) for owner, spans in enumerate(col_spans)]
    sees_keys = cache(lambda peer, p: meets(row_spans[p.owner], keys[peer], *masks))
    sees_rows = cache(lambda peer, p: meets(queries[peer], spans_of([p], col_spans), *masks))
    rows = GatherSchedule.together(j, len(row), [gathered], sees_keys)
    cols = GatherSchedule.in_turn(i, blocks, sees_rows)
    chunk_spans = spans_by_chunk(cols, col_spans)
    in_column = None if col == list(range(grid.group.size)) else grid.ring
    return _Tables(grid.ulysses, in_column, rows, cols, row_spans, chunk_spans)


def lengths(spans: Sequence[Spans]) -> list[int]:
    """Counts the positions of each list of spans."""
    return [sum(span.length for span in each) for each in spans]


def pieces(owner: int, spans: Spans) -> tuple[Piece, ...]:
    """Cuts a rank's rows in slices, so that what nobody sees is not sent; each span in as many as may be."""
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


def spans_by_chunk(schedule: GatherSchedule, spans: Sequence[Spans]) -> list[Spans]:
    """The positions of what a rank holds, by chunk.

    Args:
        spans: by owner.
    """
    return [spans_of(step.pieces, spans) for step in schedule.steps]


MESH = Strategy("mesh", mesh_attention, needs_grid=True)
