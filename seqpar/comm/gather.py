"""All-gather and its dual, reduce-scatter, along any dimension, uneven and empty shards included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from seqpar.comm.group import Group
from seqpar_kernels import accumulation_dtype, any_order


def all_gather(x: Tensor, group: Group, rows: Sequence[int], dim: int) -> Tensor:
    """The shards of all ranks, concatenated in rank order along `dim`. Differentiable.

    Args:
        x: this rank's shard, `rows[group.rank]` long along `dim`.
        rows: length of every rank's shard.
    """
    return _AllGather.apply(x, group, tuple(rows), dim)


def reduce_scatter(x: Tensor, group: Group, rows: Sequence[int], dim: int) -> Tensor:
    """This rank's shard of the sum over ranks of `x`, added in rank order. Differentiable.

    Args:
        x: `sum(rows)` long along `dim`, on every rank.
        rows: length of every rank's shard.
    """
    return _ReduceScatter.apply(x, group, tuple(rows), dim)


class _AllGather(torch.autograd.Function):
    """x [.. sl ..] -> y [.. s ..].

    forward   y = the shards of all ranks, in rank order
    backward  dx = sum over ranks of their dy, this rank's rows of it
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rows: tuple[int, ...], dim: int) -> Tensor:
        ctx.call = group, rows, dim
        return _gather(x, group, rows, dim)

    @staticmethod
    @any_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return reduce_scatter(grad_outputs[0], *ctx.call), None, None, None


class _ReduceScatter(torch.autograd.Function):
    """x [.. s ..] -> y [.. sl ..]: the dual of `_AllGather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, rows: tuple[int, ...], dim: int) -> Tensor:
        ctx.call = group, rows, dim
        return _scatter_sum(x, group, rows, dim)

    @staticmethod
    @any_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return all_gather(grad_outputs[0], *ctx.call), None, None, None


def _gather(x: Tensor, group: Group, rows: tuple[int, ...], dim: int) -> Tensor:
    # With `dim` in front each shard is one piece of memory, which can be received in place.
    x = x.movedim(dim, 0).contiguous()
    gathered = x.new_empty(sum(rows), *x.shape[1:])
    shards = gathered.split(list(rows))
    # docs/design.md: every message is point to point
    pending = group.exchange(
        "all_gather", [(r, x) for r in group.others], [(r, shards[r]) for r in group.others]
    )
    shards[group.rank].copy_(x)
    pending.wait()
    return gathered.movedim(0, dim)


def _scatter_sum(x: Tensor, group: Group, rows: tuple[int, ...], dim: int) -> Tensor:
    x = x.movedim(dim, 0).contiguous()
    ends = list(accumulate(rows, initial=0))
    shares = [x[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    mine = shares[group.rank]
    arriving = [mine if r == group.rank else torch.empty_like(mine) for r in range(group.size)]
    group.exchange(
        "reduce_scatter",
        [(r, shares[r]) for r in group.others],
        [(r, arriving[r]) for r in group.others],
    ).wait()
    wide = accumulation_dtype(x.dtype) if x.is_floating_point() else x.dtype
    total = torch.zeros_like(mine, dtype=wide)
    for share in arriving:
        total += share
    return total.to(x.dtype).movedim(0, dim)
