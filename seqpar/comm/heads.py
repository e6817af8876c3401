"""Rows for heads and back: the two all-to-alls of Ulysses, uneven in both, several tensors at once.

Before, a rank holds all heads of its rows; after, all rows of its heads, in the order of the
sequence. A head that two ranks need is sent to both; going back, their shares of it are summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
        places: by rank.
        ranges: by tensor.
        num_heads: by tensor.
    """

    group: Group
    places: tuple[Places, ...]
    ranges: tuple[Ranges, ...]
    num_heads: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """The number of rows of every rank."""
        return tuple(max((local.stop for local, _ in p), default=0) for p in self.places)

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


class _RowsToHeads(torch.autograd.Function):
    """x [b sl h w] -> y [b s hl w].

    forward   y = the rows of all ranks, of this rank's heads
    backward  dx = this rank's rows of dy, summed over the ranks that took a head
    """

    @staticmethod
    def forward(ctx: Any, trade: HeadTrade, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.trade = trade
        return _to_heads(xs, trade)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        return None, *_to_rows(grad_outputs, ctx.trade)


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
        x.new_empty(x.shape[0], sum(trade.rows), _length(trade.takes(n, rank)), x.shape[3])
        for n, x in enumerate(xs)
    )
    sends = [
        (r, x[:, local, trade.takes(n, r)].contiguous())
        for r in trade.group.others
        for n, x in enumerate(xs)
        for local, _ in places[rank]
    ]
    targets = [(r, y[:, place]) for r in trade.group.others for y in ys for _, place in places[r]]
    receives = [(r, y if y.is_contiguous() else y.new_empty(y.shape)) for r, y in targets]
    pending = trade.group.exchange("rows_to_heads", sends, receives)
    for n, (x, y) in enumerate(zip(xs, ys, strict=True)):
        for local, place in places[rank]:
            y[:, place] = x[:, local, trade.takes(n, rank)]
    pending.wait()
    for (_, target), (_, received) in zip(targets, receives, strict=True):
        if received is not target:
            target.copy_(received)
    return ys


def _to_rows(ys: Sequence[Tensor], trade: HeadTrade) -> tuple[Tensor, ...]:
    rank, rows = trade.group.rank, trade.rows
    sends = [(r, _take(y, trade.places[r])) for r in trade.group.others for y in ys]
    receives = [
        (r, y.new_empty(y.shape[0], rows[rank], _length(trade.takes(n, r)), y.shape[3]))
        for r in trade.group.others
        for n, y in enumerate(ys)
    ]
    pending = trade.group.exchange("heads_to_rows", sends, receives)
    own = [_take(y, trade.places[rank]) for y in ys]
    pending.wait()
    shares = dict(_by_rank(receives, len(ys))) | {rank: own}
    xs = []
    for n, y in enumerate(ys):
        shape = y.shape[0], rows[rank], trade.num_heads[n], y.shape[3]
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
