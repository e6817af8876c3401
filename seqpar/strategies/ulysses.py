"""Ulysses: exchange rows for heads (all-to-all), attend whole sequences on fewer heads, exchange back.

Where the parts of q are, of three ranks and six heads; each cell names the rank that holds it::

                    before and after            between
                    heads  0 1 2 3 4 5          heads  0 1 2 3 4 5
    rows of rank 0         0 0 0 0 0 0                 0 0 1 1 2 2
    rows of rank 1         1 1 1 1 1 1                 0 0 1 1 2 2
    rows of rank 2         2 2 2 2 2 2                 0 0 1 1 2 2

    q [b sl hq d], k, v [b slk hkv w]   all-to-all ->   q [b s hql d], k, v [b s hkvl w]
    out [b s hql vd]                    all-to-all ->   out [b sl hq vd]

The attention between is a ring of its own: of one rank, or, in the hybrid, of the ranks that hold the rest of
the sequence. So this file adds no loop over blocks. Heads may go in several chunks: buffers are smaller, and
the next chunk is under way while one is attended. A kv head that several ranks need is sent to each of them.

Source: Jacobs et al. 2023, DeepSpeed-Ulysses (arXiv:2309.14509), section 3; with a ring outside, Fang and
Zhao 2024, USP (arXiv:2405.07719).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.comm import AsyncExchange, serve
from seqpar.strategies.exchanges import Exchanges
from seqpar.strategies.head_chunks import dealt, in_head_order
from seqpar.strategies.plan import Plan
from seqpar.strategies.ring import ring_attention
from seqpar.strategies.strategy import Order, Strategy
from seqpar_kernels import any_order


def ulysses_attention(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
    *,
    with_lse: bool = False,
) -> tuple[Float[Tensor, "b sl hq vd"], Float[Tensor, "b sl hq"] | None]:
    """(out, lse if asked for) of this rank's rows. The call has been checked; all ranks must call.

    Any head counts will do. Ranges of query heads differ by at most one, and a kv head is sent to every rank
    whose query heads need it. Ranks beyond the number of heads attend nothing.
    """
    heads = q.shape[2], k.shape[2]
    # docs/design.md: schedules are made once
    exchanges, middle = plan.own.get(("heads", *heads), lambda: _prepared(plan, *heads))
    attend = _Attend(exchanges, middle, with_lse=with_lse)
    # docs/design.md: one rank puts its rows in order
    ys = _in_chunks((q, k, v), exchanges, attend) if exchanges.moves else attend(0, (q, k, v))
    # docs/design.md: lse is differentiated where it is asked for
    return ys[0], ys[1].squeeze(-1) if with_lse else None


class _Attend:
    """The attention between the exchanges, chunk after chunk."""

    def __init__(self, exchanges: Exchanges, middle: Plan, *, with_lse: bool) -> None:
        self._runs, self._has_kv_by_chunk = exchanges.runs, len(exchanges.cut.kv) > 1
        self._middle, self._with_lse = middle, with_lse
        self._ks: list[Tensor] = []  # for the runs to come
        self._vs: list[Tensor] = []

    def __call__(self, chunk: int, came: Sequence[Tensor]) -> list[Tensor]:
        """Attends whole sequences of some heads: out and, if asked for, lse `[b s h 1]`.

        Args:
            came: q of the chunk; k and v of the chunk, or with the first one of all.
        """
        (q, *kv), runs = came, self._runs[chunk]
        if kv:
            served = runs if self._has_kv_by_chunk else [run for each in self._runs for run in each]
            self._ks, self._vs = (list(serve(x, [(r.kv, r.group) for r in served])) for x in kv)
        qs = q.split([run.num_q for run in runs], dim=2) if len(runs) > 1 else (q,)
        outs, lses = [], []
        for run, q_r in zip(runs, qs, strict=True):
            # One list serves the runs of all chunks, because k and v may all come with the first.
            k_r, v_r = self._ks.pop(0), self._vs.pop(0)
            out, lse = ring_attention(
                q_r, k_r, v_r, self._middle, with_lse=self._with_lse, head=run.head
            )
            outs.append(out)
            lses.append(lse)
        ys = [torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]]
        if self._with_lse:
            ys.append((torch.cat(lses, dim=2) if len(lses) > 1 else lses[0]).unsqueeze(-1))
        return ys


def _in_chunks(xs: Sequence[Tensor], exchanges: Exchanges, attend: _Attend) -> list[Tensor]:
    """Attends q, k and v chunk by chunk; gives the results of own rows, in the order of heads.

    While a chunk is attended the next one comes and the one before goes back. Backward runs through the
    same in reverse, so each wait must come after the attention that it leaves time for.
    """
    cut, num = exchanges.cut, len(exchanges.cut.q)
    if num > 1:
        xs = _Together.apply(*xs)
    parts = [dealt(x, ranges) for x, ranges in zip(xs, (cut.q, cut.kv, cut.kv), strict=True)]

    def start(chunk: int) -> AsyncExchange:
        pieces = [list(part[chunk]) for part in parts if chunk < len(part)]
        return exchanges.there(chunk, [torch.cat(p, dim=2) if len(p) > 1 else p[0] for p in pieces])

    coming, arrived = [start(0)], []
    leaving: list[AsyncExchange] = []
    for chunk in range(num):
        if chunk + 1 < num:
            coming.append(start(chunk + 1))
        ys = attend(chunk, coming[chunk].wait())
        if chunk > 0:
            arrived.append(leaving[-1].wait(kept=True))
        # docs/design.md: head chunks are asynchronous exchanges
        leaving.append(exchanges.back(chunk, ys))
        del ys  # or it lives on while the next one is attended
    arrived.append(leaving[-1].wait())
    return [in_head_order(x, cut.q) for x in zip(*arrived, strict=True)]


class _Together(torch.autograd.Function):
    """The tensors themselves, all of which want gradients if one does.

    Otherwise a chunk of q alone would have no backward where q is frozen, and others would wait for it.
    """

    @staticmethod
    def forward(ctx: Any, *xs: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004 - torch's signature
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    @any_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return grad_outputs


def _prepared(plan: Plan, hq: int, hkv: int) -> tuple[Exchanges, Plan]:
    """The exchanges for so many heads, and the plan between them."""
    in_order = bool(plan.invariant)
    make = partial(Exchanges.of, plan, hq, hkv, in_order=in_order)
    exchanges = plan.kept("heads", make, hq, hkv, plan.head_chunks, in_order)
    # Invariant bits are seen to by how heads are cut; a single rank has no order to keep.
    return exchanges, replace(
        plan,
        group=exchanges.outer,
        layout=exchanges.layout,
        kv_layout=exchanges.keys,
        strategy="ring",
        grid=None,
        invariant=False,
    )


ULYSSES = Strategy(
    "ulysses",
    ulysses_attention,
    exchanges_heads=True,
    order=Order(cuts_sequences=False, by_default=True),  # a head is computed whole by one rank
)
HYBRID = Strategy("hybrid", ulysses_attention, needs_grid=True, exchanges_heads=True)
