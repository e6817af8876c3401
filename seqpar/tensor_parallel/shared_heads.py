"""kv heads that several ranks hold: the gradient of each copy becomes the sum over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seqpar.comm import Group
from seqpar.layout.heads import HeadSplit
from seqpar_kernels import accumulation_dtype, first_only


def share_heads(
    weight: Tensor, bias: Tensor | None, group: Group, dealt: HeadSplit
) -> tuple[Tensor, Tensor | None]:
    """A rank's shard of a fused weight and of its bias, unchanged; in backward, copies of kv heads add up.

    Without it each copy would learn from the query heads of its own rank only, and the copies drift apart.
    Every holder of a head adds the shares in the order of ranks, so copies stay the same bits. A rank sends
    the gradient of a head's k and v once to every other rank that holds it. All ranks must call, and go
    backward.

    Args:
        weight: `[rows, e]`, rows of q, then of k, then of v, as `FusedQKV.shard` gives them.
        bias: `[rows]`, if there is one.
        group: the ranks that the heads are dealt to.
        dealt: which has which, `FusedQKV.deal(group.size)`.
    """
    if not dealt.replicates:
        return weight, bias
    if bias is None:
        return _ShareHeads.apply(group, dealt, weight)[0], None
    weight, bias = _ShareHeads.apply(group, dealt, weight, bias)
    return weight, bias


def shared_heads(dealt: HeadSplit, rank: int) -> int:
    """How many kv heads a rank sends in backward, counted once for every rank that it sends them to."""
    return sum(heads.stop - heads.start for _, heads in _sharers(dealt, rank))


class _ShareHeads(torch.autograd.Function):
    """weight [rows e], bias [rows] of this rank -> the same.

    backward  rows of q: as they come. Rows of a kv head: the sum over the ranks that hold it.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, dealt: HeadSplit, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.call = group, dealt
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    @first_only
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, dealt = ctx.call
        wanted = ctx.needs_input_grad[2:]
        # One matrix, so that there is one message to each rank.
        columns = [
            grad.reshape(len(grad), -1) for grad, want in zip(grads, wanted, strict=True) if want
        ]
        total = torch.cat(columns, 1)
        _add_copies_(total, group, dealt)
        parts = iter(total.split([c.shape[1] for c in columns], 1))
        shaped = (
            next(parts).reshape(grad.shape) if want else None
            for grad, want in zip(grads, wanted, strict=True)
        )
        return None, None, *shaped


def _add_copies_(x: Tensor, group: Group, dealt: HeadSplit) -> None:
    """Replaces the kv rows of x `[rows, columns]` by their sums over the ranks that hold them."""
    sharers = dict(_sharers(dealt, group.rank))
    num_heads = dealt.num_q(group.rank) + 2 * dealt.num_kv(group.rank)
    by_head = x.unflatten(0, (num_heads, -1))
    _, k, v = by_head.split([dealt.num_q(group.rank), *[dealt.num_kv(group.rank)] * 2])
    own = torch.stack([k, v])  # a copy: what is sent is not what is written
    sends = [(peer, own[:, heads].contiguous()) for peer, heads in sharers.items()]
    arriving = {peer: torch.empty_like(sent) for peer, sent in sends}
    group.exchange("share_heads", sends, list(arriving.items())).wait()
    wide = accumulation_dtype(x.dtype)
    total = torch.zeros_like(own, dtype=wide)
    for peer in sorted([*arriving, group.rank]):
        if peer == group.rank:
            total += own
        else:
            total[:, sharers[peer]] += arriving[peer]
    k.copy_(total[0])
    v.copy_(total[1])


def _sharers(dealt: HeadSplit, rank: int) -> Iterator[tuple[int, slice]]:
    """The other ranks that hold some of a rank's kv heads, and which, counted among its own."""
    start, stop = dealt.kv[rank]
    for peer, (first, last) in enumerate(dealt.kv):
        low, high = max(start, first), min(stop, last)
        if peer != rank and low < high:
            yield peer, slice(low - start, high - start)
