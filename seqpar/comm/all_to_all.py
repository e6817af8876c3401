"""Rows for heads and back: the two all-to-alls of Ulysses, uneven in both, several tensors at once.

Before, a rank holds all heads of its rows; after, all rows of its heads, in the order of the
sequence. A head that two ranks need is sent to both; going back, their shares of it are summed.
Either way can be begun and left to go on while something else is done, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from seqpar.comm.async_exchange import AsyncExchange, Finish
from seqpar.comm.group import Group
from seqpar.comm.together import exchange_together
from seqpar_kernels import accumulation_dtype, first_only

Ranges = tuple[tuple[int, int], ...]  # by rank: the heads (start, stop) it takes
Places = tuple[
    tuple[slice, slice], ...
]  # of one rank: (its local rows, their place in the sequence)


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Who holds which rows, and who takes which heads of each of the exchanged tensors.

    Args:
        places: by tensor, by rank.
        ranges: by tensor.
        num_heads: by tensor.
        repeats: by tensor: `None`, or by rank the range of query heads for each of which its head is
            repeated after the exchange. Gradients then come back for every query head. They are added in
            the order of heads, so sums do not depend on which rank took which.
    """

    group: Group
    places: tuple[tuple[Places, ...], ...]
    ranges: tuple[Ranges, ...]
    num_heads: tuple[int, ...]
    repeats: tuple[Ranges | None, ...]

    @cached_property
    def rows(self) -> tuple[tuple[int, ...], ...]:
        """By tensor, the number of rows that every rank has."""
        # Local rows follow on one another from 0, so the greatest stop is their number.
        return tuple(
            tuple(max((local.stop for local, _ in p), default=0) for p in of_tensor)
            for of_tensor in self.places
        )

    def takes(self, tensor: int, rank: int) -> slice:
        """The heads of a tensor that a rank takes."""
        return slice(*self.ranges[tensor][rank])

    # Messages between two ranks are told apart by their order alone, so all ranks list tensors alike. With
    # more ranks than heads most of them take none: those have no part in the loops below.
    @cached_property
    def takers(self) -> list[tuple[int, int]]:
        """(rank, tensor) of which another rank takes heads."""
        tensors = range(len(self.places))
        return [(r, n) for r in self.group.others for n in tensors if _length(self.takes(n, r))]

    @cached_property
    def givers(self) -> list[tuple[int, int]]:
        """(rank, tensor) of which this rank takes heads and another one has rows."""
        tensors = [n for n in range(len(self.places)) if _length(self.takes(n, self.group.rank))]
        return [(r, n) for r in self.group.others for n in tensors if self.rows[n][r]]

    @cached_property
    def by_query_head(self) -> AllToAll:
        """The exchange in which a repeated head is as many heads as it serves, each taken once."""
        queries = [None if r is None else _num_heads(r) for r in self.repeats]
        return replace(
            self,
            ranges=tuple(r or own for r, own in zip(self.repeats, self.ranges, strict=True)),
            num_heads=tuple(n or h for n, h in zip(queries, self.num_heads, strict=True)),
        )

    def sums(self, tensor: int) -> bool:
        """Whether some head is taken twice, so that coming back means adding."""
        return sum(b - a for a, b in self.ranges[tensor]) > self.num_heads[tensor]


def rows_to_heads(xs: Sequence[Tensor], all_to_all: AllToAll) -> tuple[Tensor, ...]:
    """Each x `[b sl h w]` becomes `[b s hl w]`: the whole sequence of this rank's heads. Differentiable."""
    return start_to_heads(xs, all_to_all).wait()


def heads_to_rows(ys: Sequence[Tensor], all_to_all: AllToAll) -> tuple[Tensor, ...]:
    """Each y `[b s hl w]` becomes `[b sl h w]`: this rank's rows of all heads. Differentiable.

    Shares of a head that several ranks hold are added in float32 or wider, in rank order; those of a
    repeated head, in the order of the query heads.
    """
    return start_to_rows(ys, all_to_all).wait()


def start_to_heads(xs: Sequence[Tensor], all_to_all: AllToAll) -> AsyncExchange:
    """Begins `rows_to_heads`."""
    return AsyncExchange(
        xs, partial(_to_heads, all_to_all=all_to_all), partial(_to_rows, all_to_all=all_to_all)
    )


def start_to_rows(ys: Sequence[Tensor], all_to_all: AllToAll) -> AsyncExchange:
    """Begins `heads_to_rows`."""
    return AsyncExchange(
        ys, partial(_to_rows, all_to_all=all_to_all), partial(_to_heads, all_to_all=all_to_all)
    )


def serve(x: Tensor, runs: Sequence[tuple[slice, int]]) -> tuple[Tensor, ...]:
    """Gives each run the heads of `x [b s h w]` that it attends with, as views. Differentiable.

    Gradients are added in the order of runs and of the query heads in them, in float32 or wider.

    Args:
        runs: (heads, g): some heads, or with g > 1 one head, for each of g query heads.
    """
    stops = [0] + [heads.stop for heads, _ in runs]
    # Where every head serves once, and in order, nothing is to be added: torch's own views will do.
    if stops == [heads.start for heads, _ in runs] + [x.shape[2]] and all(g == 1 for _, g in runs):
        return x.split([_length(heads) for heads, _ in runs], dim=2) if len(runs) > 1 else (x,)
    return _Serve.apply(x, runs)


class _Serve(torch.autograd.Function):
    """x [b s h w] -> per run [b s hr w], a view.

    backward  dx = the sum of the gradients of what served, in order
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, runs: Sequence[tuple[slice, int]]) -> tuple[Tensor, ...]:
        ctx.runs, ctx.shape = runs, x.shape
        return tuple(
            x[:, :, heads] if g == 1 else x[:, :, heads].expand(-1, -1, g, -1) for heads, g in runs
        )

    @staticmethod
    @first_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        dtype = grad_outputs[0].dtype
        dx = grad_outputs[0].new_zeros(ctx.shape, dtype=accumulation_dtype(dtype))
        for (heads, g), dy in zip(ctx.runs, grad_outputs, strict=True):
            for share in dy.split(1, dim=2) if g > 1 else (dy,):
                dx[:, :, heads] += share
        return dx.to(dtype), None


def _to_heads(xs: Sequence[Tensor], all_to_all: AllToAll) -> Finish:
    """Begins to bring rows to their heads; large tensors are received in place if possible."""
    rank, places = all_to_all.group.rank, all_to_all.places
    rows, mine = all_to_all.rows, [_length(all_to_all.takes(n, rank)) for n in range(len(xs))]
    ys = tuple(x.new_empty(x.shape[0], sum(rows[n]), mine[n], x.shape[3]) for n, x in enumerate(xs))
    sends = [(r, xs[n][:, :, all_to_all.takes(n, r)]) for r, n in all_to_all.takers]
    staged: dict[tuple[int, int], Tensor] = {}
    receives = []
    for r, n in all_to_all.givers:
        # docs/design.md: rows come back in the order of the sequence
        target = ys[n][:, places[n][r][0][1]] if len(places[n][r]) == 1 else None
        if target is None or not target.is_contiguous():
            target = ys[n].new_empty(ys[n].shape[0], rows[n][r], *ys[n].shape[2:])
            staged[r, n] = target
        receives.append((r, target))
    pending = exchange_together(all_to_all.group, "rows_to_heads", sends, receives)
    for n, (x, y) in enumerate(zip(xs, ys, strict=True)):
        for local, place in places[n][rank]:
            y[:, place] = x[:, local, all_to_all.takes(n, rank)]

    def finish() -> tuple[Tensor, ...]:
        pending.wait()
        for (r, n), received in staged.items():
            for local, place in places[n][r]:
                ys[n][:, place] = received[:, local]
        return tuple(_repeat(y, all_to_all, n) for n, y in enumerate(ys))

    return finish


def _repeat(y: Tensor, all_to_all: AllToAll, tensor: int) -> Tensor:
    ranges = all_to_all.repeats[tensor]
    if ranges is None:
        return y
    group = _num_heads(ranges) // all_to_all.num_heads[tensor]
    rank = all_to_all.group.rank
    heads = torch.arange(*ranges[rank], device=y.device) // group
    return y.index_select(2, heads - all_to_all.ranges[tensor][rank][0])


def _to_rows(ys: Sequence[Tensor], all_to_all: AllToAll) -> Finish:
    """Begins to bring heads back to their rows; shares of a head are added once all are there."""
    rank, places, num_heads = all_to_all.group.rank, all_to_all.places, all_to_all.num_heads
    # docs/design.md: a kv head that several ranks need is sent to each
    all_to_all, group = all_to_all.by_query_head, all_to_all.group
    rows, takers = all_to_all.rows, all_to_all.takers
    sends = [(r, _take(ys[n], places[n][r])) for r, n in all_to_all.givers]
    shares = {}
    for r, n in takers:
        num, (batch, _, _, width) = _length(all_to_all.takes(n, r)), ys[n].shape
        shares[r, n] = ys[n].new_empty(batch, rows[n][rank], num, width)
    receives = [(r, x) for (r, _), x in shares.items()]
    pending = exchange_together(group, "heads_to_rows", sends, receives)
    own = [_take(y, places[n][rank]) for n, y in enumerate(ys)]

    def finish() -> tuple[Tensor, ...]:
        pending.wait()
        xs = []
        for n, mine in enumerate(own):
            shares[rank, n] = mine
            shape = mine.shape[0], rows[n][rank], all_to_all.num_heads[n], mine.shape[3]
            adds = all_to_all.sums(n)
            wide = accumulation_dtype(mine.dtype)
            x = mine.new_zeros(shape, dtype=wide) if adds else mine.new_empty(shape)
            for r in sorted({rank, *(r for r, tensor in takers if tensor == n)}):
                heads = x[:, :, all_to_all.takes(n, r)]
                heads.add_(shares[r, n]) if adds else heads.copy_(shares[r, n])
            xs.append(_fold(x.to(mine.dtype), all_to_all.num_heads[n] // num_heads[n]))
        return tuple(xs)

    return finish


def _fold(x: Tensor, group: int) -> Tensor:
    """`x [b s h*g w]` -> `[b s h w]`, each the sum of g neighbours in their order."""
    if group == 1:
        return x
    first, *others = x.unflatten(2, (-1, group)).unbind(3)
    # A copy even where the type is wide already, because `+=` would write into x.
    total = first.to(accumulation_dtype(x.dtype), copy=True)
    for other in others:
        total += other
    return total.to(x.dtype)


def _take(y: Tensor, places: Places) -> Tensor:
    """The rows of `y` that belong to a rank, in its order, contiguous."""
    rows = [y[:, place] for _, place in places] or [y[:, :0]]
    return rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, dim=1)


def _length(s: slice) -> int:
    return int(s.stop - s.start)


def _num_heads(ranges: Ranges) -> int:
    """Counts the heads of a tensor, all of which some rank takes."""
    return max(stop for _, stop in ranges)
