"""`Ranges`: every row sees one range of columns, and every column is seen by one range of rows, as data.

Packed documents, a prefix that all see, images in causal text and blocks are such ranges. What is not is
several of them, one after another.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.region import FAR, Region, of_rows
from seqpar_kernels.terms.term import Place, Term
from seqpar_kernels.transfer import on_device

Part = tuple[slice, slice, Band]  # of a block: rows, columns, and what the rows see there
_SQUARES, _REGIONS = 0, 1  # the two ways to write ranges as integers
_SIDES = len(Region._fields)


@dataclass(frozen=True)
class Ranges(Term):
    """Regions whose rows follow each other: each row is of one of them, or sees nothing.

    Each row of a region sees some column. Regions may lie beside each other in the same columns: the rows
    that see a column are neighbours.
    """

    regions: tuple[Region, ...]

    name, words = "ranges", "ranges of keys"
    needs_positions = hides = True

    @staticmethod
    def documents(bounds: Sequence[int]) -> Ranges:
        """Packed documents, each position of which sees its own document only.

        Document n holds the positions b(n) to b(n+1) - 1 of boundaries 0 = b0 <= b1 <= ... Two equal
        boundaries are an empty document. Positions from the last boundary on are one more.

        Raises:
            ValueError: the boundaries do not start at 0 or go down.
            TypeError: they are not integers.
        """
        check_bounds("documents", bounds)
        ends = pairwise((*bounds, FAR))
        return Ranges(tuple(Region(a, b, a, b) for a, b in ends if a < b))

    @cached_property
    def by_columns(self) -> Ranges:
        """The same ranges with rows and columns exchanged."""
        return Ranges(tuple(_exchanged(self.regions)))

    def num_within(self, length: int) -> int:
        """How many regions there are in so many positions, by their mean length."""
        inside = [region for region in self.regions if region.bottom < FAR]
        total = inside[-1].bottom if inside else 0
        return max(1, round(length * len(inside) / max(total, 1)))

    def visible(self, place: Place) -> Bool[Tensor, "i j"]:
        """True where a row sees a column."""
        first, end = self._seen(place.row)
        return (place.col >= first[:, None]) & (place.col < end[:, None])

    def parts(self, row: int, num_rows: int, col: int, num_cols: int, step: int) -> Iterator[Part]:
        """(rows, columns, band) of parts of a block that hold all that is visible in it, none of it twice."""
        if num_rows == 0 or num_cols == 0:
            return
        last_row, last_col = row + (num_rows - 1) * step, col + (num_cols - 1) * step
        for region in self.regions[self._near(row, last_row, col, last_col)]:
            part = region.within(row, num_rows, col, num_cols, step)
            if part is not None:
                yield part

    def limits(
        self, start: int, length: int, others: int, num_others: int, step: int, device: torch.device
    ) -> Int[Tensor, "length 2"]:
        """Per row, the range of columns that it sees, as indices (first, last + 1); int32.

        Rows are the positions start, start + step, ... and columns likewise from `others` on. The first end
        is past the last where nothing is seen.
        """
        positions = start + step * torch.arange(length, device=device)
        first, end = (-((others - x) // step) for x in self._seen(positions))
        first, end = first.clamp_(0, num_others), end.clamp_(0, num_others)
        hidden = first >= end
        # So that a row that sees nothing does not widen what a tile of rows sees.
        first, end = first.masked_fill_(hidden, num_others), end.masked_fill_(hidden, 0)
        return torch.stack((first, end), dim=1).int()

    def _seen(self, positions: Int[Tensor, "n"]) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
        """The columns, first and last + 1, that rows see; nothing is (FAR, -FAR)."""
        # Before the first region stands none, which sees nothing.
        tops, bottoms, lefts, rights, lowers, uppers = on_device(self._table, positions.device)
        n = torch.searchsorted(tops, positions, right=True) - 1
        hidden = positions >= bottoms[n]
        first = torch.maximum(lefts[n], positions + lowers[n]).masked_fill_(hidden, FAR)
        end = torch.minimum(rights[n], positions + uppers[n] + 1).masked_fill_(hidden, -FAR)
        return first, end

    @cached_property
    def _table(self) -> Int[Tensor, "6 n"]:
        """The regions as a tensor of the host, made once."""
        none = Region(-FAR, -FAR)
        return torch.tensor((none, *self.regions), device="cpu").T.contiguous()

    def _near(self, row: int, last_row: int, col: int, last_col: int) -> slice:
        """The regions that may have a part in some rows and columns."""
        near = of_rows(self.regions, row, last_row)
        if not self._descends:
            return near
        first = bisect_right(self.regions, col, near.start, key=attrgetter("right"))
        stop = max(first, near.stop)
        stop = bisect_right(self.regions, last_col, first, stop, key=attrgetter("left"))
        return slice(first, stop)

    @cached_property
    def _descends(self) -> bool:
        """Whether no region lies further left than one above it."""
        return all(a.left <= b.left and a.right <= b.right for a, b in pairwise(self.regions))

    @classmethod
    def schema(cls) -> Iterator[tuple[str, str]]:
        """One list of integers."""
        yield "int[]?", cls.name

    def written(self) -> list[Any]:
        """The regions as integers, of squares their ends alone."""
        if all(region == Region(*region[:2], *region[:2]) for region in self.regions):
            ends = (end for region in self.regions for end in region[:2])
            return [[_SQUARES, *ends]]
        return [[_REGIONS, *chain.from_iterable(self.regions)]]

    @classmethod
    def read(cls, values: Collection[Any]) -> Ranges | None:
        """The ranges that were `written`; `None` if there were none."""
        (numbers,) = values
        if numbers is None:
            return None
        kind, *rest = numbers
        if kind == _SQUARES:
            return Ranges(tuple(Region(a, b, a, b) for a, b in _in_groups(rest, 2)))
        return Ranges(tuple(Region(*sides) for sides in _in_groups(rest, _SIDES)))


def parts_of(
    band: Band, ranges: Ranges | None, row: int, num_rows: int, col: int, num_cols: int, step: int
) -> Iterator[Part]:
    """The parts of a block, see `Ranges.parts`, where a band hides scores besides ranges, if any."""
    if ranges is None:
        yield slice(0, num_rows), slice(0, num_cols), band
        return
    for rows, cols, inner in ranges.parts(row, num_rows, col, num_cols, step):
        yield rows, cols, band.at(rows.start, cols.start) & inner


def counts(parts: Iterable[Part]) -> Iterator[int]:
    """Yields how many scores of each part are visible."""
    for rows, cols, band in parts:
        yield band.count(rows.stop - rows.start, cols.stop - cols.start)


def check_bounds(name: str, bounds: Sequence[int]) -> None:
    """Checks cumulative lengths.

    Raises:
        ValueError: they do not start at 0 or go down.
        TypeError: they are not integers.
    """
    if not all(isinstance(b, int) and not isinstance(b, bool) for b in bounds):
        raise TypeError(f"{name} must be integer boundaries, got {bounds!r}")
    if not bounds or bounds[0] != 0 or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"{name} must be boundaries from 0 upwards, the cumulative lengths, got {bounds!r}"
        )


def _in_groups(numbers: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    return zip(*(iter(numbers),) * size, strict=True)


def _exchanged(regions: Sequence[Region]) -> Iterator[Region]:
    """Yields regions whose rows are the columns of these, in order.

    Of regions that see a column, the first one says where the rows that see it begin, the last one where they
    end: those between are neighbours.
    """
    seen = [region.columns for region in regions]
    borders = sorted({x for ends in seen for x in ends})
    place = {x: n for n, x in enumerate(borders)}
    num = max(0, len(borders) - 1)
    cells = [range(place[a], place[b]) for a, b in seen]
    firsts = _painted(cells, range(len(regions)), num)
    lasts = _painted(cells, reversed(range(len(regions))), num)
    begin = 0
    for n in range(num):
        if n + 1 < num and (firsts[n], lasts[n]) == (firsts[n + 1], lasts[n + 1]):
            continue
        top, bottom = borders[begin], borders[n + 1]
        begin, first, last = n + 1, firsts[n], lasts[n]
        if first is not None and last is not None:
            above, below = regions[first], regions[last]
            yield Region(top, bottom, above.top, below.bottom, -above.upper, -below.lower)


def _painted(cells: Sequence[range], order: Iterator[int] | range, num: int) -> list[int | None]:
    """For each of `num` cells, the first in this order that covers it; `None` where none does."""
    paint: list[int | None] = [None] * num
    after = list(range(num + 1))  # of each cell, one from it on behind which none before is bare

    def bare(n: int) -> int:
        while after[n] != n:
            after[n] = after[after[n]]
            n = after[n]
        return n

    for which in order:
        n = bare(cells[which].start)
        while n < cells[which].stop:
            paint[n], after[n] = which, n + 1
            n = bare(n + 1)
    return paint
