"""What is written, and what added to, where sums hold nothing yet: the first to touch a part writes it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from torch import Tensor

# Whether dq, and whether dk and dv, hold nothing yet.
Begins = tuple[bool, bool]
ADDED: Begins = (False, False)


def first_touches(parts: Sequence[slice], *sums: Tensor | None, begins: bool) -> list[bool]:
    """For each part of dim 1 of some sums, whether what comes there first is to be written.

    Sums that begin hold nothing: what no part writes becomes zero here. A part that lies over one before it
    adds, also to such zeros.

    Args:
        parts: in the order in which gradients come to them.
        sums: of one length in dim 1; those that are `None` are not wanted.
    """
    there = [x for x in sums if x is not None]
    if not begins or not there:
        return [False] * len(parts)
    length = there[0].shape[1]
    # These two are most of what comes in a ring of many ranks.
    if not parts:
        for x in there:
            x.zero_()
        return []
    if len(parts) == 1 and parts[0] == slice(0, length):
        return [True]
    # The union of the parts so far, as disjoint ranges in order.
    starts: list[int] = []
    stops: list[int] = []
    flags = []
    for part in parts:
        low, high = bisect_right(stops, part.start), bisect_left(starts, part.stop)
        flags.append(low >= high)
        if part.start < part.stop:
            start, stop = min([part.start, *starts[low:high]]), max([part.stop, *stops[low:high]])
            starts[low:high], stops[low:high] = [start], [stop]
    written = [part for part, first in zip(parts, flags, strict=True) if first]
    end = 0
    for part in (*sorted(written, key=lambda x: x.start), slice(length, None)):
        _zero(there, slice(end, part.start))
        end = max(end, part.stop or 0)
    return flags


def _zero(sums: Sequence[Tensor], part: slice) -> None:
    if part.start < part.stop:
        for x in sums:
            x[:, part].zero_()


def put(total: Tensor, share: Tensor, sign: int = 1, *, begins: bool) -> None:
    """Adds sign * share to a sum, or writes it where the sum begins."""
    if not begins:
        total.add_(share, alpha=sign)
        return
    total.copy_(share)
    if sign != 1:
        total.mul_(sign)
