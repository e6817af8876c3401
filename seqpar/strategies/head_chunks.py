"""Heads are cut in chunks here, one of which is on its way while another is attended.

Integers and views only: exchanges and attention are in `ulysses`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.comm import Ranges
from seqpar.layout import HeadSplit


@dataclass(frozen=True)
class Run:
    """The heads of a chunk that one rank attends at once.

    With `group` 1 the query heads share the kv heads in equal groups as usual. With more, they are that many
    and share one. Each then has gradients of k and v of its own, to be added in the order of heads.

    Args:
        head: which of the attention's query heads is the first.
        q: of the chunk's query heads on this rank.
        kv: of the kv heads on this rank.
    """

    head: int
    q: slice
    kv: slice
    group: int = 1

    @property
    def num_q(self) -> int:
        """The number of query heads."""
        return int(self.q.stop - self.q.start)

    @property
    def num_kv(self) -> int:
        """The number of kv heads that the kernel meets."""
        return int(self.kv.stop - self.kv.start) * self.group


@dataclass(frozen=True)
class Cut:
    """The chunks of a call: part c of every rank's heads is chunk c.

    Args:
        heads: before they were cut.
        q: by chunk and rank, its query heads.
        kv: by chunk and rank, its kv heads; or only one entry, if all go with the first chunk.
    """

    heads: HeadSplit
    q: tuple[Ranges, ...]
    kv: tuple[Ranges, ...]

    @staticmethod
    def of(heads: HeadSplit, num_chunks: int) -> Cut:
        """Cuts heads in at most so many chunks, none of which is empty on all ranks.

        K and v are cut too, unless a kv head is on two ranks or a rank has fewer of them than chunks. Chunks
        then end where kv heads do.
        """
        group, ranks = heads.hq // heads.hkv, range(len(heads.q))
        num = min(num_chunks, max(map(heads.num_q, ranks)))
        enough = group == 1 or all(heads.num_kv(r) >= num for r in ranks if heads.num_q(r))
        with_kv = num > 1 and enough and not heads.replicates
        unit = group if with_kv else 1
        q = tuple(tuple(_part(*own, unit, c, num) for own in heads.q) for c in range(num))
        kv = (tuple(tuple((a // unit, b // unit) for a, b in ranges) for ranges in q)
              if with_kv else (heads.kv,))  # fmt: skip
        return Cut(heads, q, kv)

    def runs(self, chunk: int, rank: int, *, in_order: bool) -> Iterator[Run]:
        """Yields the runs that a rank attends of a chunk: at least one, be it of no heads.

        Args:
            in_order: whether gradients of a kv head are added in the order of query heads. Where some kv
                head is on two ranks, k and v then are at hand once for every query head.
        """
        heads, group = self.heads, self.heads.hq // self.heads.hkv
        start, stop = self.q[chunk][rank]
        kv_start = self.kv[chunk if len(self.kv) > 1 else 0][rank][0]
        first, last = start // group, (stop - 1) // group
        # docs/design.md: ranks without heads run the same graph
        if start == stop:
            yield Run(start, slice(0, 0), slice(0, 0))
        elif in_order and heads.replicates:
            at = start - heads.q[rank][0]
            yield Run(start, slice(0, stop - start), slice(at, at + stop - start))
        elif in_order and group > 1:
            for kv in range(first, last + 1):
                a, b = max(start, kv * group), min(stop, (kv + 1) * group)
                at = kv - kv_start
                yield Run(a, slice(a - start, b - start), slice(at, at + 1), b - a)
        else:
            part = HeadSplit(heads.hq, heads.hkv, ((start, stop),), ((first, last + 1),))
            at = first - kv_start
            for s in part.segments(0):
                yield Run(start + s.q.start, s.q, slice(s.kv.start + at, s.kv.stop + at))


def _part(start: int, stop: int, unit: int, part: int, num: int) -> tuple[int, int]:
    """Gives one of `num` parts of a range of heads, cut between units, whose sizes differ by at most one."""
    count = (stop - start) // unit
    return start + unit * (part * count // num), start + unit * ((part + 1) * count // num)


def packed(ranges: Sequence[Ranges], chunk: int) -> Ranges:
    """The ranges of the ranks' heads in a tensor that has those of this chunk only."""
    if len(ranges) == 1:
        return ranges[0]
    stops = [0]
    for a, b in ranges[chunk]:
        stops.append(stops[-1] + b - a)
    return tuple(zip(stops[:-1], stops[1:], strict=True))


def dealt(x: Tensor, ranges: Sequence[Ranges]) -> list[Sequence[Tensor]]:
    """Deals `x [b s h w]` to chunks: for each the pieces it is made of, rank after rank, as views."""
    if len(ranges) == 1:
        return [(x,)]
    sizes = [b - a for of_rank in zip(*ranges, strict=True) for a, b in of_rank]
    # The heads of a rank lie together, cut in chunks: so every n-th piece belongs to one chunk.
    pieces = x.split(sizes, dim=2)
    return [pieces[chunk :: len(ranges)] for chunk in range(len(ranges))]


def in_head_order(xs: Sequence[Tensor], ranges: Sequence[Ranges]) -> Tensor:
    """Puts chunks together to `x [b s h w]`: the inverse of `dealt`."""
    if len(xs) == 1:
        return xs[0]
    sizes = ([b - a for a, b in of_chunk] for of_chunk in ranges)
    pieces = (x.split(size, dim=2) for x, size in zip(xs, sizes, strict=True))
    return torch.cat([p for of_rank in zip(*pieces, strict=True) for p in of_rank], dim=2)
