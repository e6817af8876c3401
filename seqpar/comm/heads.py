"""Rows for heads and back: the two all-to-alls of Ulysses, uneven in both, several tensors at once.

Before, a rank holds all heads of its rows; after, all rows of its heads, in the order of the
sequence. A head that two ranks need is sent to both; going back, their shares of it are summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqpar.comm.group import Group

Ranges = tuple[tuple[int, int], ...]  # by rank: the heads (start, stop) it takes
Places = tuple[
    tuple[slice, slice], ...
]  # of one rank: (its local rows, their place in the sequence)


@dataclass(frozen=True, eq=False)
class HeadTrade:
    """Who holds which rows, and who takes which heads of each of the traded tensors.

    Args:
        places: by tensor, by rank.
        ranges: by tensor.
        num_heads: by tensor.
        repeats: by tensor: `None`, or by rank the range of query heads for each of which its head is
            repeated after the trade. Gradients then come back for every query head and are added in the
            order of heads, so that sums do not depend on which rank took which.
    """

    group: Group
    places: tuple[tuple[Places, ...], ...]
    ranges: tuple[Ranges, ...]
    num_heads: tuple[int, ...]
    repeats: tuple[Ranges | None, ...]

    def rows(self, tensor: int) -> tuple[int, ...]:
        """The number of rows of a tensor that every rank has."""
        places = self.places[tensor]
        return tuple(max((local.stop for local, _ in p), default=0) for p in places)

    def takes(self, tensor: int, rank: int) -> slice:
        """The heads of a tensor that a rank takes."""
        return slice(*self.ranges[tensor][rank])

    def sums(self, tensor: int) -> bool:
        """Whether some head is taken twice, so that coming back means adding."""
        return sum(b - a for a, b in self.ranges[tensor]) > self.num_heads[tensor]


def rows_to_heads(xs: Sequence[Tensor], trade: HeadTrade) -> tuple[Tensor, ...]:
    """Each x `[b sl h w]` becomes `[b s hl w]`: the whole sequence of this rank's heads. Differentiable."""
    return _RowsToHeads.apply(trade, *xs)


def heads_to_rows(ys: Sequence[Tensor], trade: HeadTrade) -> tuple[Tensor, ...]:
    """Each y `[b s hl w]` becomes `[b sl h w]`: this rank's rows of all heads. Differentiable.

    Shares of a head that several ranks hold are added in float32 or wider, in rank order.
    """
    return _HeadsToRows.apply(trade, *ys)


def per_query_head(x: Tensor, group: int) -> Tensor:
    """`x [b s 1 w]` for each of `group` query heads, without a copy. Differentiable.

    Gradients are added in the order of heads, in float32 or wider.
    """
    return _PerQueryHead.apply(x, group)


class _PerQueryHead(torch.autograd.Function):
    """x [b s 1 w] -> y [b s g w], a view.    backward  dx = dy of the heads, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: int) -> Tensor:
        ctx.group = group
        return x.expand(-1, -1, group, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _fold(grad_outputs[0], ctx.group), None


def _fold(y: Tensor, group: int) -> Tensor:
    """`y [b s h*g w]` -> `[b s h w]`, each the sum of g neighbours in their order."""
    first, *others = y.unflatten(2, (-1, group)).unbind(3)
    total = first.to(torch.promote_types(y.dtype, torch.float32), copy=True)
    for other in others:
        total += other
    return total.to(y.dtype)


class _RowsToHeads(torch.autograd.Function):
    """x [b sl h w] -> y [b s hl w].

    forward   y = the rows of all ranks, of this rank's heads, repeated where the trade says
    backward  dx = this rank's rows of dy, summed over the ranks that took a head
    """

    @staticmethod
    def forward(ctx: Any, trade: HeadTrade, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.trade = trade
        ys = _to_heads(xs, trade)
        return tuple(_repeat(y, trade, n) for n, y in enumerate(ys))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        trade: HeadTrade = ctx.trade
        query_heads = [max(stop for _, stop in r) if r else None for r in trade.repeats]
        by_query = replace(
            trade,
            ranges=tuple(r or own for r, own in zip(trade.repeats, trade.ranges, strict=True)),
            num_heads=tuple(n or h for n, h in zip(query_heads, trade.num_heads, strict=True)),
        )
        dxs = _to_rows(grad_outputs, by_query)
        return None, *(
            dx if n is None else _fold(dx, n // h)
            for dx, n, h in zip(dxs, query_heads, trade.num_heads, strict=True)
        )


def _repeat(y: Tensor, trade: HeadTrade, tensor: int) -> Tensor:
    ranges = trade.repeats[tensor]
    if ranges is None:
        return y
    group = max(stop for _, stop in ranges) // trade.num_heads[tensor]
    rank = trade.group.rank
    heads = torch.arange(*ranges[rank], device=y.device) // group
    return y.index_select(2, heads - trade.ranges[tensor][rank][0])


class _HeadsToRows(torch.autograd.Function):
    """y [b s hl w] -> x [b sl h w]: the dual of `_RowsToHeads`."""

    @staticmethod
    def forward(ctx: Any, trade: HeadTrade, *ys: Tensor) -> tuple[Tensor, ...]:
        ctx.trade = trade
        return _to_rows(ys, trade)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        return None, *_to_heads(grad_outputs, ctx.trade)


def _to_heads(xs: Sequence[Tensor], trade: HeadTrade) -> tuple[Tensor, ...]:
    """One message per rank, tensor and span, received where it belongs if that is one piece."""
    rank, places = trade.group.rank, trade.places
    ys = tuple(
        x.new_empty(x.shape[0], sum(trade.rows(n)), _length(trade.takes(n, rank)), x.shape[3])
        for n, x in enumerate(xs)
    )
    sends = [
        (r, x[:, local, trade.takes(n, r)].contiguous())
        for r in trade.group.others
        for n, x in enumerate(xs)
        for local, _ in places[n][rank]
    ]
    targets = [
        (r, y[:, place])
        for r in trade.group.others
        for n, y in enumerate(ys)
        for _, place in places[n][r]
    ]
    receives = [(r, y if y.is_contiguous() else y.new_empty(y.shape)) for r, y in targets]
    pending = trade.group.exchange("rows_to_heads", sends, receives)
    for n, (x, y) in enumerate(zip(xs, ys, strict=True)):
        for local, place in places[n][rank]:
            y[:, place] = x[:, local, trade.takes(n, rank)]
    pending.wait()
    for (_, target), (_, received) in zip(targets, receives, strict=True):
        if received is not target:
            target.copy_(received)
    return ys


def _to_rows(ys: Sequence[Tensor], trade: HeadTrade) -> tuple[Tensor, ...]:
    rank, places = trade.group.rank, trade.places
    sends = [(r, _take(y, places[n][r])) for r in trade.group.others for n, y in enumerate(ys)]
    receives = [
        (r, y.new_empty(y.shape[0], trade.rows(n)[rank], _length(trade.takes(n, r)), y.shape[3]))
        for r in trade.group.others
        for n, y in enumerate(ys)
    ]
    pending = trade.group.exchange("heads_to_rows", sends, receives)
    own = [_take(y, places[n][rank]) for n, y in enumerate(ys)]
    pending.wait()
    shares = dict(_by_rank(receives, len(ys))) | {rank: own}
    xs = []
    for n, y in enumerate(ys):
        shape = y.shape[0], trade.rows(n)[rank], trade.num_heads[n], y.shape[3]
        adds = trade.sums(n)
        wide = torch.promote_types(y.dtype, torch.float32)
        x = y.new_zeros(shape, dtype=wide) if adds else y.new_empty(shape)
        for r in range(trade.group.size):
            heads = x[:, :, trade.takes(n, r)]
            heads.add_(shares[r][n]) if adds else heads.copy_(shares[r][n])
        xs.append(x.to(y.dtype))
    return tuple(xs)


def _take(y: Tensor, places: Places) -> Tensor:
    """The rows of `y` that belong to a rank, in its order, contiguous."""
    rows = [y[:, place] for _, place in places] or [y[:, :0]]
    return rows[0].contiguous() if len(rows) == 1 else torch.cat(rows, dim=1)


def _by_rank(
    messages: Sequence[tuple[int, Tensor]], each: int
) -> Iterator[tuple[int, list[Tensor]]]:
    """Messages, `each` per rank, as (rank, tensors)."""
    for start in range(0, len(messages), each):
        yield messages[start][0], [x for _, x in messages[start : start + each]]


def _length(s: slice) -> int:
    return int(s.stop - s.start)
