"""`balanced`: equal rows and equal work on every rank, for packed documents of any lengths.

The blocks lie on a circle in order of position. Of the arcs that hold half of the rows, some do more than
half of the work and some less. From one arc to the next, work changes by a block's at most: so one of them
does just half. Half of the ranks take it, the gap closes, and both halves are split again, until every rank
has its share. One causal document becomes a zigzag this way; of many, arcs begin and end where documents do.

Source: Alon 1987, Splitting necklaces (2 * size - 2 cuts divide two measures fairly).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from seqpar.layout.circle import Blocks, Circle, Runs
from seqpar.layout.mask import CAUSAL, FULL, Mask
from seqpar.layout.shards import Layout, contiguous, zigzag
from seqpar.layout.spans import joined

PERMILLE = 50  # how far from the mean a rank may be
PPM = 10**6
NEAR_PPM = 5000  # from the mean, which is near enough


def balanced(
    length: int, size: int, mask: Mask | Sequence[Mask], *, multiple_of: int = 1
) -> Layout:
    """Every rank holds about as many rows as any other, and they see about as many keys under `mask`.

    Both are within 5 % of their mean over ranks. Where blocks are too coarse for 5 %, they are within two
    blocks of it (two that see the most); a short last block counts as a whole one. Where that leaves no more
    than two blocks to a rank it may hold none: nothing is refused as impossible. There are at most
    2 * size - 1 spans in all, sorted by position on every rank, and ranks by their first position.

    Within these bounds a rank takes runs of whole documents where it finds them, else cuts one, else
    two. Documents that do not begin at a multiple of multiple_of are cut where they meet on two ranks.

    Without documents and window this is `zigzag`, or `contiguous` if the mask is not causal.

    Args:
        mask: what is attended later, or the masks of a batch; documents must end where the sequence does.

    Raises:
        ValueError: length is negative, size or multiple_of is not positive, or the documents end elsewhere.
        TypeError: they are not integers.
    """
    masks = (mask,) if isinstance(mask, Mask) else tuple(mask)
    causal = all(each.layers == CAUSAL for each in masks)
    layout = (zigzag if causal else contiguous)(length, size, multiple_of=multiple_of)
    for each in masks:
        if each.lengths is not None and each.lengths[0] != each.lengths[1]:
            raise ValueError(
                "queries and keys that are two sequences have no common balance; deal each by itself"
            )
        if each.lengths is not None and each.lengths[0] != length:
            raise ValueError(
                f"documents must end where the sequence does, at {length}, got {each.lengths[0]}; "
                "seqpar.padded_documents makes a document of padding behind them"
            )
    if length == 0 or causal or all(each.layers == FULL for each in masks):
        return replace(layout, kind="balanced")
    blocks = Blocks(length, masks, multiple_of)
    runs = _shares(blocks, [(0, blocks.num_blocks)], size, size)
    shares = [joined(blocks.span(*run) for run in of_rank) for of_rank in runs]
    shares.sort(key=lambda spans: spans[0].start if spans else length)
    return Layout("balanced", length, size, tuple(shares))


def _shares(blocks: Blocks, runs: Runs, size: int, num_ranks: int) -> Iterator[Runs]:
    """Yields the runs of each of the `num_ranks` ranks, of `size` in all, that share these runs."""
    if num_ranks == 1:
        yield runs
        return
    circle, taken = Circle(blocks, runs), num_ranks // 2
    # docs/design.md: `balanced` splits a necklace
    arc, rest = circle.split(*_Choice(circle, size, num_ranks, taken).best())
    yield from _shares(blocks, arc, size, taken)
    yield from _shares(blocks, rest, size, num_ranks - taken)


class _Choice:
    """The choice of an arc for `taken` of the `num_ranks` ranks, of `size` in all, that share a circle."""

    def __init__(self, circle: Circle, size: int, num_ranks: int, taken: int) -> None:
        self.circle, self.size, self.num_ranks, self.taken = circle, size, num_ranks, taken
        self.rows = self._range(circle.num_blocks, circle.blocks.num_blocks)
        self.work = self._range(circle.work, circle.blocks.work)
        self.goal = circle.work * taken // num_ranks

    def best(self) -> tuple[int, int]:
        """Finds the arc (start, stop) with as few cuts as will do, and then as near the mean as can be."""
        circle = self.circle
        if circle.num_blocks == 0:
            return 0, 0
        found: list[tuple[bool, int, int, int]] = []
        for find in (self._whole_documents, self._cut_once, self._cut_twice):
            for arc in find():
                found.append((not self._fits(arc), self._off(arc), *arc[:2]))
                # To look through all arcs for one that is nearer still takes longer than it is worth.
                if found[-1] < (False, NEAR_PPM):
                    return arc[:2]
            if found and not min(found)[0]:
                break
        # `_cut_twice` finds arcs in any circle, so there is a best one even where none fits.
        return min(found)[2:]

    def _range(self, left: int, whole: int) -> tuple[int, int]:
        """The least and the most to take of what is left of a whole: both sides are near their shares."""
        others = self.num_ranks - self.taken
        least, most = _around(whole * self.taken, self.size, _permille(self.taken))
        rest = _around(whole * others, self.size, _permille(others))
        return max(least, left - rest[1]), min(most, left - rest[0])

    def _fits(self, arc: tuple[int, int, int]) -> bool:
        start, stop, work = arc
        (least, most), (least_work, most_work) = self.rows, self.work
        return least <= stop - start <= most and least_work <= work <= most_work

    def _off(self, arc: tuple[int, int, int]) -> int:
        """How far an arc is from its share of rows or of work, in millionths of it."""
        start, stop, work = arc
        rows, all_work = self.circle.num_blocks * self.taken, self.circle.work * self.taken
        return max(
            abs((stop - start) * self.num_ranks - rows) * PPM // rows,
            # Of rows that see nothing there is no work.
            abs(work * self.num_ranks - all_work) * PPM // max(1, all_work),
        )

    def _whole_documents(self) -> Iterator[tuple[int, int, int]]:
        """Finds arcs within bounds that cut nothing: of each beginning the one nearest to the mean work."""
        borders, works, goal = self.circle.borders, self.circle.works, self.goal
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
        circle, goal = self.circle, self.goal
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
        circle, num_ranks, goal = self.circle, self.num_ranks, self.circle.work * self.taken
        share = circle.num_blocks * self.taken
        for rows in {share // num_ranks, -(-share // num_ranks)}:
            # One arc more than it takes to be back at the first: neighbours are compared all the way round.
            before = [circle.work_before(n * rows) for n in range(num_ranks + 2)]
            works = [b - a for a, b in pairwise(before)]
            for n, (work, other) in enumerate(pairwise(works)):
                low, high = n * rows, (n + 1) * rows
                yield low, high, work
                is_more = work * num_ranks > goal
                if is_more == (other * num_ranks > goal):
                    continue
                while high - low > 1:
                    start = (low + high) // 2
                    work = circle.work_before(start + rows) - circle.work_before(start)
                    yield start, start + rows, work
                    if is_more == (work * num_ranks > goal):
                        low = start
                    else:
                        high = start


def _permille(num_ranks: int) -> int:
    """How far from their share so many ranks may be together: nearer the more often it is split again."""
    return PERMILLE // (1 + (num_ranks - 1).bit_length())


def _around(amount: int, size: int, permille: int) -> tuple[int, int]:
    """The integers within so many thousandths of amount / size: the least, and the greatest."""
    least = -(-amount * (1000 - permille) // (1000 * size))
    return least, amount * (1000 + permille) // (1000 * size)
