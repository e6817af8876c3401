"""`Circle`: blocks that are still to be dealt, the last before the first, and the work of any arc."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

from seqpar.layout.mask import Mask
from seqpar.layout.spans import Span
from seqpar.layout.work import Work, cuts

Runs = list[tuple[int, int]]


class Blocks:
    """The sequence in blocks of `multiple_of` positions, and their work: the keys that rows see under masks.

    `borders` are the blocks before which nobody sees a key behind it, or from it on one before it, such as
    those with which a document begins; `works` is the work before each.
    """

    def __init__(self, length: int, masks: Sequence[Mask], multiple_of: int) -> None:
        self.length, self.multiple_of = length, multiple_of
        self.num_blocks = -(-length // multiple_of)
        # A document meets itself from one position on, so one band serves them all.
        self._works = [Work(layer, length) for mask in masks for layer in mask.layers]
        self.work = self.work_before(self.num_blocks)
        begins = [x for x in cuts(masks, length) if x % multiple_of == 0]
        self.borders = [x // multiple_of for x in begins]
        self.works = [self.work_before(block) for block in self.borders]

    def work_before(self, block: int) -> int:
        """The work of the rows before a block."""
        position, total = min(block * self.multiple_of, self.length), 0
        for work in self._works:
            total += work.before(position)
        return total

    def span(self, start: int, stop: int) -> Span:
        """The positions of the blocks from `start` to `stop - 1`."""
        first = start * self.multiple_of
        return Span(first, min(stop * self.multiple_of, self.length) - first)


class Circle:
    """Runs of blocks that no rank holds yet, joined end to end.

    A place is a number of blocks along the circle from where the first run begins; places from `num_blocks`
    on are on the next turn. `borders` are the places where a cut parts no document, or one that is cut
    there already. They go to the end of the second turn; `works` is the work before each.
    """

    def __init__(self, blocks: Blocks, runs: Runs) -> None:
        self.blocks, self.runs = blocks, runs
        self._places = list(accumulate((b - a for a, b in runs), initial=0))
        before = [blocks.work_before(a) for a, _ in runs]
        works = (blocks.work_before(b) - w for (_, b), w in zip(runs, before, strict=True))
        self._works = list(accumulate(works, initial=0))
        self.num_blocks, self.work = self._places[-1], self._works[-1]
        # What makes of a block its place, and of the work before it the work before the place.
        self._shift = [p - a for p, (a, _) in zip(self._places, runs, strict=False)]
        self._work_shift = [w - b for w, b in zip(self._works, before, strict=False)]
        borders = [border for n in range(len(runs)) for border in self._borders_of(n)]
        next_turn = [(place + self.num_blocks, work + self.work) for place, work in borders]
        end = 2 * self.num_blocks, 2 * self.work
        self.borders, self.works = map(list, zip(*borders, *next_turn, end, strict=True))

    def work_before(self, place: int) -> int:
        """The work from where the first run begins up to a place."""
        turns, place = divmod(place, self.num_blocks)
        n = bisect_right(self._places, place) - 1
        work = self.blocks.work_before(place - self._shift[n]) + self._work_shift[n]
        return turns * self.work + work

    def split(self, start: int, stop: int) -> tuple[Runs, Runs]:
        """The runs of the arc between two places, which is at most one turn, and those of the rest."""
        # An empty circle has no turns; the 1 only keeps from dividing by zero.
        turns = start // max(1, self.num_blocks) * self.num_blocks
        start, stop = start - turns, stop - turns
        over = max(0, stop - self.num_blocks)
        arc = self._between(0, over) + self._between(start, stop)
        return arc, self._between(over, start) + self._between(stop, self.num_blocks)

    def _between(self, start: int, stop: int) -> Runs:
        """The parts of the runs between two places of the first turn."""
        parts = (
            (max(a, start - shift), min(b, stop - shift))
            for (a, b), shift in zip(self.runs, self._shift, strict=True)
        )
        return [(a, b) for a, b in parts if a < b]

    def _borders_of(self, n: int) -> Iterator[tuple[int, int]]:
        """Yields (place, work before it) of a run's beginning and of each document that begins in it."""
        (start, stop), borders = self.runs[n], self.blocks.borders
        shift, work_shift = self._shift[n], self._work_shift[n]
        yield start + shift, self._works[n]
        for i in range(bisect_right(borders, start), bisect_left(borders, stop)):
            yield borders[i] + shift, self.blocks.works[i] + work_shift
