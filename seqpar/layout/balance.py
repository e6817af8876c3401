"""`balanced`: equal rows and equal work on every rank, for packed documents of any lengths.

The blocks lie on a circle in order of position. Of the arcs that hold a rank's share of the rows, some do
more than its share of the work and some less. From one arc to the next, work changes by a block's at most:
so one of them does just its share. A rank takes it, the gap closes, the next rank chooses. One
causal document becomes a zigzag this way; of many, arcs begin and end where documents do.

Source: Alon 1987, Splitting necklaces (2 * size - 2 cuts divide two measures fairly).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from seqpar.layout.circle import Blocks, Circle
from seqpar.layout.mask import Mask
from seqpar.layout.shards import Layout, contiguous, zigzag
from seqpar.layout.spans import Span, joined

PERMILLE = 50  # how far from the mean a rank may be
PPM = 10**6


def balanced(length: int, size: int, mask: Mask, *, multiple_of: int = 1) -> Layout:
    """Every rank holds about as many rows as any other, and they see about as many keys under `mask`.

    Both are within 5 % of their mean over ranks. Where blocks are too coarse for 5 %, they are within two
    blocks of it (two that see the most); a short last block counts as a whole one. Where that leaves no more
    than two blocks to a rank it may hold none: nothing is refused as impossible. There are at most
    2 * size - 1 spans in all, sorted by position on every rank, and ranks by their first position.

    Within these bounds a rank takes runs of whole documents where it finds them, else cuts one, else
    two. Documents that do not begin at a multiple of multiple_of are cut where they meet on two ranks.

    Without documents and window this is `zigzag`, or `contiguous` if the mask is not causal.

    Args:
        mask: what is attended later; documents must end where the sequence does.

    Raises:
        ValueError: length is negative, size or multiple_of is not positive, or the documents end elsewhere.
        TypeError: they are not integers.
    """
    layout = (zigzag if mask.causal else contiguous)(length, size, multiple_of=multiple_of)
    if mask.documents is not None and mask.documents[-1] != length:
        raise ValueError(
            f"documents must end where the sequence does, at {length}, got {mask.documents[-1]}"
        )
    if length == 0 or (mask.documents is None and mask.window is None):
        return replace(layout, kind="balanced")
    blocks = Blocks(length, mask, multiple_of)
    circle = Circle(blocks, [(0, blocks.num_blocks)])
    shares: list[tuple[Span, ...]] = []
    for num_ranks in range(size, 0, -1):
        # docs/design.md: `balanced` splits a necklace
        share, rest = circle.split(*_Choice(circle, size, num_ranks).best())
        shares.append(joined(blocks.span(*run) for run in share))
        circle = Circle(blocks, rest)
    shares.sort(key=lambda spans: spans[0].start if spans else length)
    return Layout("balanced", length, size, tuple(shares))


class _Choice:
    """The choice of an arc by one of the `num_ranks` ranks, of `size` in all, that share what is left."""

    def __init__(self, circle: Circle, size: int, num_ranks: int) -> None:
        self.circle, self.size, self.num_ranks = circle, size, num_ranks
        self.rows = self._range(circle.num_blocks, circle.blocks.num_blocks)
        self.work = self._range(circle.work, circle.blocks.work)

    def best(self) -> tuple[int, int]:
        """Finds the arc (start, stop) with as few cuts as will do, and then as near the mean as can be."""
        circle = self.circle
        if self.num_ranks == 1 or circle.num_blocks == 0:
            return 0, circle.num_blocks
        arcs: list[tuple[int, int, int]] = []
        for find in (self._whole_documents, self._cut_once, self._cut_twice):
            arcs += find()
            if arcs and self._fits(best := min(arcs, key=self._cost)):
                break
        # `_cut_twice` finds arcs in any circle, so there is a best one even where none fits.
        return best[:2]

    def _range(self, left: int, whole: int) -> tuple[int, int]:
        """The least and the most to take of what is left of a whole.

        Within these the rank is near its share of the whole, and the mean of the others nearer.
        """
        others = self.num_ranks - 1
        least, most = _around(whole, self.size, PERMILLE)
        rest = _around(whole * others, self.size, PERMILLE if others == 1 else PERMILLE // 2)
        return max(least, left - rest[1]), min(most, left - rest[0])

    def _fits(self, arc: tuple[int, int, int]) -> bool:
        start, stop, work = arc
        (least, most), (least_work, most_work) = self.rows, self.work
        return least <= stop - start <= most and least_work <= work <= most_work

    def _cost(self, arc: tuple[int, int, int]) -> tuple[int, int, int, int]:
        start, stop, work = arc
        row_share, work_share = (stop - start) * self.num_ranks, work * self.num_ranks
        off = max(
            abs(row_share - self.circle.num_blocks) * PPM // self.circle.num_blocks,
            abs(work_share - self.circle.work) * PPM // self.circle.work,
        )
        cuts = self.circle.num_cuts(start, stop)
        return (0, cuts, off, start) if self._fits(arc) else (1, off, cuts, start)

    def _whole_documents(self) -> Iterator[tuple[int, int, int]]:
        """Finds arcs within bounds that cut nothing: of each beginning the one nearest to the mean work."""
        borders, works, goal = (
            self.circle.borders,
            self.circle.works,
            self.circle.work // self.num_ranks,
        )
        (least, most), (least_work, most_work) = self.rows, self.work
        # Arcs begin on the first turn of the circle; the second is there for them to end on.
        for start, work in zip(borders[: len(borders) // 2], works, strict=False):
            first = max(bisect_left(borders, start + least), bisect_left(works, work + least_work))
            end = min(bisect_right(borders, start + most), bisect_right(works, work + most_work))
            if first < end:
                n = min(bisect_left(works, work + goal, first, end), end - 1)
                if n > first and works[n] - work - goal > goal + work - works[n - 1]:
                    n -= 1
                yield start, borders[n], works[n] - work

    def _cut_once(self) -> Iterator[tuple[int, int, int]]:
        """Finds arcs within bounds of rows, with the mean work, that cut nothing where they begin, or end."""
        circle, goal = self.circle, self.circle.work // self.num_ranks
        borders, works, (least, most) = circle.borders, circle.works, self.rows
        slack = self.work[1] - self.work[0]
        if least > most or slack < 0:
            return
        for n, (border, work) in enumerate(zip(borders, works, strict=True)):
            begins = n < len(borders) // 2
            first, last = (
                (border + least, border + most) if begins else (border - most, border - least)
            )
            aim = work + goal if begins else work - goal
            # Three times faster: the borders around say of most arcs that work is out of bounds.
            nearby = works[bisect_right(borders, first) - 1], works[bisect_left(borders, last)]
            if nearby[0] > aim + slack or nearby[1] < aim - slack:
                continue
            near = bisect_left(range(first, last + 1), aim, key=circle.work_before)
            # The aim lies between these two places, or beyond both.
            for place in {first + max(0, near - 1), min(first + near, last)}:
                between = abs(circle.work_before(place) - work)
                yield (border, place, between) if begins else (place, border, between)

    def _cut_twice(self) -> Iterator[tuple[int, int, int]]:
        """Finds arcs with the mean rows and about the mean work.

        Arcs that lie side by side around the circle do the mean on average. Between one that does less
        and one that does more lies one that does neither.
        """
        circle, num_ranks = self.circle, self.num_ranks
        for rows in {circle.num_blocks // num_ranks, -(-circle.num_blocks // num_ranks)}:
            starts = [n * rows for n in range(num_ranks + 1)]
            # One arc more than ranks, of the next turn, so that neighbours are compared all the way round.
            before = [circle.work_before(n * rows) for n in range(num_ranks + 2)]
            works = [b - a for a, b in pairwise(before)]
            yield from ((a, a + rows, work) for a, work in zip(starts, works, strict=True))
            for (low, work), (high, other) in pairwise(zip(starts, works, strict=True)):
                is_more = work * num_ranks > circle.work
                if is_more == (other * num_ranks > circle.work):
                    continue
                while high - low > 1:
                    start = (low + high) // 2
                    work = circle.work_before(start + rows) - circle.work_before(start)
                    yield start, start + rows, work
                    if is_more == (work * num_ranks > circle.work):
                        low = start
                    else:
                        high = start


def _around(amount: int, size: int, permille: int) -> tuple[int, int]:
    """The integers within so many thousandths of amount / size: the least, and the greatest."""
    least = -(-amount * (1000 - permille) // (1000 * size))
    return least, amount * (1000 + permille) // (1000 * size)
