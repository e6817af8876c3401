"""`combine`: merges the partial results that ranks have of the same items into one that all have.

An all-reduce by hand: one message to every other rank, a merge in rank order, one message back. What a
merge is, the caller says; a library's all-reduce knows sums only.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise

from torch import Tensor

from seqpar.comm.group import Group

Merge = Callable[[Tensor, slice], Tensor]


def combine(x: Tensor, group: Group, merge: Merge) -> Tensor:
    """The merged items `[n u]`, the same bits on every rank. Not differentiable. All ranks must call.

    Rank r merges the r-th of `size` runs of items and sends the result to all.

    Args:
        x: what this rank has of each item, `[n w]`, contiguous.
        merge: (what the ranks have of some items, in rank order `[size i w]`, which items) -> `[i u]`, of
            any type. Called with no items too, where there are fewer items than ranks.
    """
    if group.size == 1:
        return merge(x.unsqueeze(0), slice(0, x.shape[0]))
    runs = shares(x.shape[0], group.size)
    mine = runs[group.rank]
    arriving = x.new_empty(group.size, mine.stop - mine.start, x.shape[1])
    # docs/design.md: every message is point to point
    pending = group.exchange(
        "combine",
        [(r, x[runs[r]]) for r in group.others],
        [(r, arriving[r]) for r in group.others],
    )
    arriving[group.rank].copy_(x[mine])
    pending.wait()
    merged = merge(arriving, mine).contiguous()
    whole = merged.new_empty(x.shape[0], merged.shape[1])
    pending = group.exchange(
        "combine",
        [(r, merged) for r in group.others],
        [(r, whole[runs[r]]) for r in group.others],
    )
    whole[mine].copy_(merged)
    pending.wait()
    return whole


def combine_elements(num_items: int, rank: int, size: int) -> tuple[int, int]:
    """Counts the items that a rank sends to be merged, and merged ones: about n (P - 1) / P each."""
    mine = shares(num_items, size)[rank]
    num_mine = mine.stop - mine.start
    return num_items - num_mine, num_mine * (size - 1)


def shares(num_items: int, size: int) -> list[slice]:
    """Deals the items to the ranks that merge them, in runs whose lengths differ by at most one."""
    short, longer = divmod(num_items, size)
    ends = accumulate((short + (r < longer) for r in range(size)), initial=0)
    return [slice(a, b) for a, b in pairwise(ends)]
