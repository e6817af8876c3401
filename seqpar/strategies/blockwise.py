"""The one loop over blocks of scores, forward and backward. A route says where rows and keys come from.

Ring, all-gather and mesh differ only in their `Route`: which query rows a rank works on, how keys reach
it, and how sums go home. Whatever the layout, a rank meets spans of rows with spans of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from seqpar.comm import Delivery, Piece, gather_pass, once
from seqpar.strategies.plan import Plan, Spans
from seqpar_kernels import (
    Partial,
    Rows,
    Score,
    accumulation_dtype,
    attend,
    attend_backward,
    finish,
    sink_gradient_rows,
    sum_rows,
)


@dataclass
class Visit:
    """Query rows and keys that meet in backward, and what to add their gradients to, if wanted."""

    row_spans: Spans
    col_spans: Spans
    rows: Rows
    k: Tensor
    v: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dslopes: Tensor | None = None


@dataclass
class Gradients:
    """Of this rank's own rows, in the type of sums. `dslopes` has a share for every row.

    The route makes dq, dk and dv: those that are summed elsewhere are nowhere until they come home.
    """

    dtype: torch.dtype
    dslopes: Tensor | None
    dq: Tensor = field(init=False)
    dk: Tensor = field(init=False)
    dv: Tensor = field(init=False)

    def zeros(self, like: Tensor) -> Tensor:
        """To sum the gradient of a tensor in."""
        return torch.zeros(like.shape, dtype=self.dtype, device=like.device)


class Route(Protocol):
    """How one rank meets the keys that its rows see."""

    def rows(self, q: Tensor) -> tuple[Spans, Tensor]:
        """The query rows this rank works on."""

    def columns(self, k: Tensor, v: Tensor) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """The keys and values that some of those rows see, in turn."""

    def merged(self, running: Partial) -> Partial:
        """This rank's own rows, of all ranks that worked on them."""

    def visits(self, mine: Rows, k: Tensor, v: Tensor, into: Gradients) -> Iterator[Visit]:
        """What meets in backward, in turn. `into` holds the gradients once this is exhausted."""


def blockwise_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, route: Route, score: Score, head: int
) -> tuple[Tensor, Tensor]:
    """(out `[b sl hq vd]`, lse `[b sl hq]`) of this rank's rows.

    Args:
        score: of the query heads at hand, resolved.
        head: which of the attention's query heads is the first of q.
    """
    return _Blockwise.apply(q, k, v, score.alibi_slopes, score.sinks, score, plan, route, head)


class _Blockwise(torch.autograd.Function):
    """q [b sl hq d], k [b sl hkv d], v [b sl hkv vd] of this rank -> out [b sl hq vd], lse [b sl hq].

    forward   out = merge over keys met of attend(q, k_c, v_c), lse likewise
    backward  dq, dk, dv are summed where the route says and come home to their owners
              slopes and sinks `[hq]` get the share of their gradient that this rank's rows have
    saved     q k v out lse: this rank's own rows, never a gathered sequence
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slopes: Tensor | None,
        sinks: Tensor | None,
        score: Score,
        plan: Plan,
        route: Route,
        head: int,
    ) -> tuple[Tensor, Tensor]:
        score = replace(score, alibi_slopes=slopes, sinks=sinks)
        out, lse = once(
            lambda: _attend(q, k, v, plan, route, score, head),
            2,
            lambda: like_results(q, v),
        )
        ctx.call = replace(score, alibi_slopes=None, sinks=None), plan, route, head
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, slopes, sinks, out, lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (dout, dlse), (score, plan, route, head) = grad_outputs, ctx.call
        q, k, v, slopes, sinks, out, lse = ctx.saved_tensors
        score = replace(score, alibi_slopes=slopes)
        dout = torch.zeros_like(out) if dout is None else dout
        mine = Rows.of(q, out, dout, lse, dlse, implementation=plan.implementation)
        dslopes = torch.zeros_like(lse) if ctx.needs_input_grad[3] else None
        into = Gradients(accumulation_dtype(q.dtype), dslopes)
        for visit in route.visits(mine, k, v, into):
            for rows, cols, block in plan.blocks(visit.row_spans, visit.col_spans, score, head):
                attend_backward(
                    visit.rows[rows], visit.k[:, cols], visit.v[:, cols], block,
                    into=(_some(visit.dq, rows), _some(visit.dk, cols), _some(visit.dv, cols)),
                    dslopes=_some(visit.dslopes, rows), implementation=plan.implementation,
                )  # fmt: skip
            del visit
        dslopes = dsinks = None
        if into.dslopes is not None:
            dslopes = _share(into.dslopes, plan).to(slopes.dtype)
        if ctx.needs_input_grad[4]:
            dsinks = _share(sink_gradient_rows(sinks, lse, mine.delta), plan).to(sinks.dtype)
        dq, dk, dv = (x.to(q.dtype) for x in (into.dq, into.dk, into.dv))
        return dq, dk, dv, dslopes, dsinks, *(None,) * 4


def _attend(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, route: Route, score: Score, head: int
) -> tuple[Tensor, Tensor]:
    """The forward loop."""
    row_spans, q_r = route.rows(q)
    running = Partial.identity(q_r, v.shape[-1])
    for col_spans, k_c, v_c in route.columns(k, v):
        for rows, cols, block in plan.blocks(row_spans, col_spans, score, head):
            attend(
                q_r[:, rows], k_c[:, cols], v_c[:, cols], block,
                into=running[rows], implementation=plan.implementation,
            )  # fmt: skip
        del k_c, v_c  # or they live on while the next ones arrive
    running = route.merged(running)
    return finish(running, q.dtype, score.sinks, implementation=plan.implementation)


def like_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors like (out, lse) of these, with nothing in them."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def learned_elements(plan: Plan, rank: int, num_learned: int, batch_heads: int) -> int:
    """Elements that a rank sends for the gradients of so many learned tensors `[hq]`, see `_share`."""
    if not plan.invariant or rank == 0 or plan.layout.size == 1:
        return 0
    return num_learned * plan.layout.rows[rank] * batch_heads


def _share(x: Tensor, plan: Plan) -> Tensor:
    """What this rank's rows add to a gradient `[hq]` of which `x [b sl hq]` has a part for every row.

    Where bits must not depend on the number of ranks, rank 0 adds all rows in the order of positions and
    the others have nothing to add.
    """
    group, layout = plan.group, plan.layout
    if not plan.invariant or group.size == 1:
        return sum_rows(x)
    pieces = tuple(Piece(rank, 0, n) for rank, n in enumerate(layout.rows))
    to_first = Delivery(group.rank, group.size, 1, lambda *_: pieces, lambda rank, _: rank == 0)
    ((_, (everything,)),) = gather_pass((x,), to_first, group, primitive="learned")
    if group.rank > 0:
        return x.new_zeros(x.shape[2])
    return sum_rows(everything.index_select(1, layout.inverse().to(x.device)))


def _some(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[:, rows]
