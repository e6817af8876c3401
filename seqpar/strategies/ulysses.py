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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.comm import (
    AllToAll,
    AsyncExchange,
    Grid,
    Group,
    Places,
    serve,
    start_to_heads,
    start_to_rows,
)
from seqpar.layout import Layout, held, joined, split_heads, whole
from seqpar.strategies.head_chunks import Cut, dealt, in_head_order, packed
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
    grid = _grid(plan)
    (i, j), inner = grid.index_of(plan.group.rank), grid.ulysses
    middle, at_q, at_k = _middle(plan, grid)
    cut = _cut(plan, grid, q.shape[2], k.shape[2])
    attend = _Attend(cut, j, middle, in_order=bool(plan.invariant), with_lse=with_lse)
    # docs/design.md: one rank puts its rows in order
    if inner.size == 1 and not any(map(_moves, (*at_q[i], *at_k[i]))):
        ys = attend(0, (q, k, v))
    else:
        exchanges = _Exchanges(cut, inner, at_q[i], at_k[i], in_order=bool(plan.invariant))
        ys = _in_chunks((q, k, v), exchanges, attend)
    # docs/design.md: lse is differentiated where it is asked for
    return ys[0], ys[1].squeeze(-1) if with_lse else None


class _Attend:
    """The attention between the exchanges, chunk after chunk."""

    def __init__(
        self, cut: Cut, rank: int, middle: Plan, *, in_order: bool, with_lse: bool
    ) -> None:
        chunks = range(len(cut.q))
        self._runs = [list(cut.runs(chunk, rank, in_order=in_order)) for chunk in chunks]
        self._has_kv_by_chunk = len(cut.kv) > 1
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


class _Exchanges:
    """The exchanges of one rank, chunk after chunk."""

    def __init__(
        self, cut: Cut, group: Group, at_q: tuple[Places, ...], at_k: tuple[Places, ...], *, in_order: bool
    ) -> None:  # fmt: skip
        self.cut, self._group, self._places = cut, group, (at_q, at_k, at_k)
        repeats = cut.heads.q if in_order and cut.heads.replicates else None
        self._repeats = None, repeats, repeats

    def there(self, chunk: int, xs: Sequence[Tensor]) -> AsyncExchange:
        """Begins to bring q of a chunk, and k and v if they go with it, to where they are attended."""
        cut, n = self.cut, len(xs)
        ranges = tuple(packed(x, chunk) for x in (cut.q, cut.kv, cut.kv)[:n])
        return start_to_heads(xs, self._all_to_all(ranges, self._places[:n], self._repeats[:n]))

    def back(self, chunk: int, ys: Sequence[Tensor]) -> AsyncExchange:
        """Begins to bring out of a chunk, and lse if it is there, to where its rows are."""
        n = len(ys)
        ranges = (packed(self.cut.q, chunk),) * n
        return start_to_rows(ys, self._all_to_all(ranges, self._places[:1] * n, (None,) * n))

    def _all_to_all(self, ranges: Any, places: Any, repeats: Any) -> AllToAll:
        num_heads = tuple(max(stop for _, stop in by_rank) for by_rank in ranges)
        return AllToAll(self._group, places, ranges, num_heads, repeats)


def _in_chunks(xs: Sequence[Tensor], exchanges: _Exchanges, attend: _Attend) -> list[Tensor]:
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


def _cut(plan: Plan, grid: Grid, hq: int, hkv: int) -> Cut:
    size = grid.shape[1]
    return Cut.of(split_heads(hq, hkv, size), plan.head_chunks if size > 1 else 1)


def _grid(plan: Plan) -> Grid:
    return plan.group.grid(ring=1) if plan.grid is None else plan.grid


def _middle(
    plan: Plan, grid: Grid
) -> tuple[Plan, tuple[tuple[Places, ...], ...], tuple[tuple[Places, ...], ...]]:
    """The plan between the exchanges, and where the rows of q and of k then are, by ring index and rank."""
    layout, at_q = _merged(plan.layout, grid.members)
    keys, at_k = _merged(plan.keys, grid.members)
    outer = Group.alone() if grid.shape[0] == 1 else grid.ring
    # Invariant bits are seen to here, by how heads are cut; a single rank has no order to keep.
    middle = replace(
        plan,
        group=outer,
        layout=layout,
        kv_layout=keys,
        strategy="ring",
        grid=None,
        invariant=False,
    )
    return middle, at_q, at_k


def _merged(
    layout: Layout, members: Sequence[Sequence[int]]
) -> tuple[Layout, tuple[tuple[Places, ...], ...]]:
    """The layout in which the ranks of each row are one, their rows in the order of positions."""
    if len(members) == 1:
        return whole(layout.length), (tuple(layout.places(rank) for rank in members[0]),)
    all_spans, all_places = [], []
    for ranks in members:
        rows = [
            (span, n, at) for n, rank in enumerate(ranks) for at, span in held(layout.spans[rank])
        ]
        # Rows of a single rank stay in its own order, so that nothing is moved for it.
        if len(ranks) > 1:
            rows.sort(key=lambda row: row[0].start)
        places: list[list[tuple[slice, slice]]] = [[] for _ in ranks]
        for (place, _), (_, n, at) in zip(held([s for s, _, _ in rows]), rows, strict=True):
            places[n].append((at, place))
        all_spans.append(joined(span for span, _, _ in rows))
        by_row = (sorted(p, key=lambda pair: pair[0].start) for p in places)
        all_places.append(tuple(tuple(p) for p in by_row))
    merged = Layout(layout.kind, layout.length, len(members), tuple(all_spans))
    return merged, tuple(all_places)


def _moves(places: Places) -> bool:
    """Whether any row lies elsewhere in the sequence than on its rank."""
    return any((at.start, at.stop) != (place.start, place.stop) for at, place in places)


ULYSSES = Strategy(
    "ulysses",
    ulysses_attention,
    exchanges_heads=True,
    order=Order(cuts_sequences=False, by_default=True),  # a head is computed whole by one rank
)
HYBRID = Strategy("hybrid", ulysses_attention, needs_grid=True, exchanges_heads=True)
