"""The one loop over blocks of scores, forward and backward. A route says where rows and keys come from.

Ring, all-gather and mesh differ only in their `Route`: which query rows a rank works on, how keys reach
it, and how sums go home. Whatever the layout, a rank meets spans of rows with spans of keys. Forward is an
online softmax: running sums that each block of keys continues, normalised once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from seqpar.comm import GatherSchedule, Piece, arrival, gather_pass, once
from seqpar.strategies.plan import Plan, Spans
from seqpar_kernels import (
    BY_BLOCKS,
    Begins,
    Block,
    Implementation,
    Partial,
    Rows,
    Score,
    Totals,
    accumulation_dtype,
    attend,
    attend_backward,
    begin,
    finish,
    finished_gradients,
    first_only,
    first_touches,
    may_hold_poison,
    sum_rows,
    tables,
)
from seqpar_kernels.terms.modifiers import check_held, held_by
from seqpar_kernels.transfer import on_device

Learned = Mapping[str, Tensor]  # by the name of a learned tensor, each row's share of its gradient


@dataclass(frozen=True)
class Meeting:
    """Query rows and keys that meet in backward, and what to add their gradients to, if wanted.

    Args:
        begins: whether dq, and whether dk and dv, hold nothing yet, and are to be written whole.
    """

    row_spans: Spans
    col_spans: Spans
    rows: Rows
    k: Tensor
    v: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    learned: Learned
    begins: Begins


@dataclass(frozen=True)
class Gradients:
    """The gradients of this rank's own rows, in the type of sums, with what other ranks have added.

    Args:
        learned: by the name of a learned tensor that blocks add to, a share of every row.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    learned: Learned


Differentiate = Callable[[Meeting], None]


def zeros_for(x: Tensor) -> Tensor:
    """Zeros to sum the gradient of a tensor in."""
    # docs/design.md: gradients travel in float32
    return torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device)


class Sums:
    """Sums of the gradients of some tensors, which the first meeting writes and those after it add to."""

    def __init__(self, *like: Tensor) -> None:
        # docs/design.md: sums of gradients begin with the first share
        self._sums = [
            torch.empty(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in like
        ]
        self._begins = True

    def take(self) -> tuple[list[Tensor], bool]:
        """(the sums, whether they hold nothing yet and are to be written)."""
        begins, self._begins = self._begins, False
        return self._sums, begins

    def whole(self) -> list[Tensor]:
        """The sums, zeros where there was no meeting."""
        sums, begins = self.take()
        return [x.zero_() if begins else x for x in sums]


class Route(Protocol):
    """A way for one rank to meet the keys that its rows see."""

    def rows(self, q: Tensor) -> tuple[Spans, Tensor]:
        """The query rows this rank works on."""

    def columns(self, k: Tensor, v: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """Yields the keys and values that some of the query rows see."""

    def merged(self, running: Partial) -> Partial:
        """Merges for this rank's own rows what all ranks have that worked on them."""

    def backward(
        self, mine: Rows, k: Tensor, v: Tensor, learned: Learned, differentiate: Differentiate
    ) -> Gradients:
        """Has all that meets in backward differentiated, in turn, and gives the sums of it.

        Args:
            learned: zeros for the rows of this rank, to be added to or replaced.
        """


@dataclass(frozen=True, eq=False)
class _Call:
    """All that a call has besides tensors.

    Args:
        score: of the query heads at hand, resolved, without its tensors.
        names: of the score's tensors, in their order.
        head: which of the attention's query heads is the first of q.
    """

    plan: Plan
    route: Route
    score: Score
    names: tuple[str, ...]
    head: int

    def scored(self, tensors: tuple[Tensor, ...]) -> Score:
        """The score with its tensors."""
        return self.score.with_tensors(dict(zip(self.names, tensors, strict=True)))


def attend_by(
    route: Route, q: Tensor, k: Tensor, v: Tensor, plan: Plan, score: Score, *, head: int = 0
) -> tuple[Tensor, Tensor]:
    """Attends along a route: (out `[b sl hq vd]`, lse `[b sl hq]`) of this rank's rows.

    Args:
        score: of the query heads at hand, resolved.
        head: which of the attention's query heads is the first of q.
    """
    tensors = score.tensors
    call = _Call(plan, route, score.without_tensors(), tuple(tensors), head)
    return _Loop.apply(call, q, k, v, *tensors.values(), *score.captured)


class _Loop(torch.autograd.Function):
    """q [b sl hq d], k [b sl hkv d], v [b sl hkv vd] of this rank -> out [b sl hq vd], lse [b sl hq].

    forward   out = merge over keys met of attend(q, k_c, v_c), lse likewise
    backward  dq, dk, dv are summed where the route says and come home to their owners
              learned tensors [hq] get the share of their gradient that this rank's rows have; biases,
              and tensors that a `score_mod` holds, that of the scores that this rank has computed
    saved     q k v out lse: this rank's own rows, never a gathered sequence
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor, *held: Tensor
    ) -> tuple[Tensor, Tensor]:
        # A `score_mod` holds the others itself; here they are only so that gradients reach them.
        tensors = held[: len(call.names)]
        # docs/design.md: a replay keeps what must not be done twice
        out, lse = once(lambda: _forward(call, q, k, v, tensors), 2, lambda: like_results(q, v))
        ctx.call, ctx.arrive = call, arrival()
        # An lse that nobody differentiates must come as `None`: zeros would look like a gradient.
        ctx.set_materialize_grads(False)
        ctx.held = held_by(call.plan.functions)
        ctx.save_for_backward(q, k, v, out, lse, *tensors, *ctx.held)
        return out, lse

    @staticmethod
    @first_only
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.arrive()
        (dout, dlse), call, plan = grad_outputs, ctx.call, ctx.call.plan
        q, k, v, out, lse, *tensors = ctx.saved_tensors  # raises where one was written since
        check_held(ctx.held, plan.functions)
        tensors = tensors[: len(call.names)]
        score = call.scored(tuple(tensors))
        wanted = [n for n, w in zip(call.names, ctx.needs_input_grad[4:], strict=False) if w]
        of_tables, held = tables(score, wanted), call.score.captured
        totals = Totals((*of_tables.values(), *held))
        dout = torch.zeros_like(out) if dout is None else dout
        mine = Rows.of(q, out, dout, lse, dlse, implementation=plan.implementation)
        by_row = {name: torch.zeros_like(lse) for name in wanted if name in BY_BLOCKS}

        def differentiate(met: Meeting) -> None:
            finite = met.rows.finite and not may_hold_poison(met.k, met.v)
            for batch, mask in plan.by_batch:
                spans, first = (met.row_spans, met.col_spans), batch.start or 0
                blocks = [*plan.blocks(*spans, mask, score, call.head, first)]
                dq, dk, dv = (None if x is None else x[batch] for x in (met.dq, met.dk, met.dv))
                by_rows = first_touches([rows for rows, *_ in blocks], dq, begins=met.begins[0])
                touched = [cols for _, cols, _ in blocks]
                by_cols = first_touches(touched, dk, dv, begins=met.begins[1])
                for (rows, cols, block), of_q, of_kv in zip(blocks, by_rows, by_cols, strict=True):
                    attend_backward(
                        met.rows[batch, rows], met.k[batch, cols], met.v[batch, cols], block,
                        into=(_some(dq, rows), _some(dk, cols), _some(dv, cols)),
                        learned={name: x[batch, rows] for name, x in met.learned.items()},
                        sums=totals.sums,
                        implementation=plan.implementation, finite=finite, begins=(of_q, of_kv),
                    )  # fmt: skip

        gradients = call.route.backward(mine, k, v, by_row, differentiate)
        shares = {**gradients.learned, **finished_gradients(score, lse, mine.delta, wanted)}
        found: dict[str, Tensor | None] = {
            name: _own_gradient(x, plan).to(score.tensors[name].dtype) for name, x in shares.items()
        }
        found |= {name: totals.take(x) for name, x in of_tables.items()}
        learned = [*(found.get(name) for name in call.names), *map(totals.take, held)]
        return None, *(x.to(q.dtype) for x in (gradients.dq, gradients.dk, gradients.dv)), *learned


def _forward(
    call: _Call, q: Tensor, k: Tensor, v: Tensor, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    plan, route, score = call.plan, call.route, call.scored(tensors)
    row_spans, q_r = route.rows(q)
    running: Partial | None = None
    # Looked for once for all tiles, since to look takes a sum over each tensor.
    finite_q = not may_hold_poison(q_r)
    for col_spans, k_c, v_c in route.columns(k, v):
        finite = finite_q and not may_hold_poison(k_c, v_c)
        for batch, mask in plan.by_batch:
            place = mask, score, call.head, batch.start or 0
            for rows, cols, block in plan.blocks(row_spans, col_spans, *place):
                running = _continued(
                    running, (batch, rows), q_r, k_c[batch, cols], v_c[batch, cols], block,
                    plan.implementation, finite,
                )  # fmt: skip
        del k_c, v_c  # or they live on while the next ones arrive
    if running is None:
        running = Partial.identity(q_r, v.shape[-1])
    running = route.merged(running)
    return finish(running, q.dtype, score, implementation=plan.implementation)


def _continued(
    running: Partial | None, where: tuple[slice, slice], q: Tensor, k: Tensor, v: Tensor, block: Block,
    implementation: Implementation | None, finite: bool,
) -> Partial:  # fmt: skip
    """The sums of all rows after some of them have met a block: continued, or begun by it."""
    q_rows = q[where]
    if running is None and q_rows.shape == q.shape:
        return begin(q_rows, k, v, block, implementation=implementation, finite=finite)
    if running is None:
        running = Partial.identity(q, v.shape[-1])
    attend(q_rows, k, v, block, into=running[where], implementation=implementation, finite=finite)
    return running


def like_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors like (out, lse) of these, with nothing in them."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def _own_gradient(x: Tensor, plan: Plan) -> Tensor:
    """Sums a gradient `[hq]` over this rank's rows, of which `x [b sl hq]` has a part each.

    Where bits must not depend on the number of ranks, rank 0 adds all rows in the order of positions. The
    others then have nothing to add.
    """
    group, layout = plan.group, plan.layout
    # docs/design.md: gradients of slopes and sinks are shares
    if not plan.invariant:
        return sum_rows(x)
    if group.size == 1:
        return sum_rows(x.index_select(1, on_device(layout.inverse(), x.device)))
    pieces = tuple(Piece(rank, 0, n) for rank, n in enumerate(layout.rows))
    to_first = GatherSchedule.together(group.rank, group.size, [pieces], lambda rank, _: rank == 0)
    ((_, (everything,)),) = gather_pass((x,), to_first, group, primitive="learned")
    if group.rank > 0:
        return x.new_zeros(x.shape[2])
    return sum_rows(everything.index_select(1, on_device(layout.inverse(), x.device)))


def _some(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[:, rows]
