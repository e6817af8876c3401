"""What masks have in common and what either shows, as regions in a few layers.

Rows are cut into strips inside of which no two limits cross: there a mask is a list of disjoint ranges of
columns, in order, and two masks join as lists of ranges do. Of the strips layers are put together again, and
in each layer those strips that one region can say.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise, product
from typing import NamedTuple

from seqpar_kernels import FAR, Region

Regions = tuple[Region, ...]


class Layers(tuple[Regions, ...]):
    """The regions of each layer of a mask, known to be layers: disjoint, and each as `Ranges` wants it."""


def joined_regions(
    ours: Sequence[Region], theirs: Sequence[Region], keeps: Callable[[bool, bool], bool]
) -> Layers:
    """The layers of all scores that `keeps` says of: whether ours show it, and whether theirs do.

    Regions may overlap. A layer is as few regions as its rows allow; see `Ranges`.
    """
    layers: list[_Growing] = []
    for strip, ranges in _strips(ours, theirs, keeps):
        _deal(strip, ranges, layers)
    return Layers(layer.finished() for layer in layers)


def layers_of(regions: Sequence[Region]) -> Layers:
    """The layers of what some regions show, which may overlap."""
    return joined_regions(regions, (), lambda ours, _: ours)


def both(ours: Layers, theirs: Layers) -> Layers:
    """The layers of what both show."""
    return joined_regions(_flat(ours), _flat(theirs), lambda a, b: a and b)


def either(ours: Layers, theirs: Layers) -> Layers:
    """The layers of what either shows, the fewest of: all anew, and those of one with the rest of the other.

    A window beside a few global tokens so stays what it was.
    """
    a, b = _flat(ours), _flat(theirs)
    anew = joined_regions(a, b, lambda x, y: x or y)
    if len(anew) <= 1:
        return anew
    ways = [
        anew,
        Layers(ours + joined_regions(b, a, lambda x, y: x and not y)),
        Layers(theirs + joined_regions(a, b, lambda x, y: x and not y)),
    ]
    # Which way must not depend on which mask comes first.
    return min(ways, key=lambda way: (len(way), len(_flat(way)), way))


def _flat(layers: Layers) -> Regions:
    return tuple(chain.from_iterable(layers))


class _Limit(NamedTuple):
    """A limit of ranges in a strip: the column in its first row, and how much it moves in each."""

    start: int
    slope: int

    def at(self, strip: range) -> int:
        """The column in the last row of the strip; none is so far as that of an open one."""
        return self.start if not self.slope else min(FAR, self.start + strip.stop - 1 - strip.start)


_Range = tuple[_Limit, _Limit]


def _strips(
    ours: Sequence[Region], theirs: Sequence[Region], keeps: Callable[[bool, bool], bool]
) -> Iterator[tuple[range, list[_Range]]]:
    """Yields strips of rows, downwards, with the disjoint ranges that are kept in each."""
    waiting = sorted(
        ((r.top, r, whose) for whose, rs in enumerate((ours, theirs)) for r in rs), reverse=True
    )
    ends = sorted({x for top, r, _ in waiting for x in (top, r.bottom)})
    active: list[tuple[Region, int]] = []
    for top, bottom in pairwise(ends):
        active = [(r, whose) for r, whose in active if r.bottom > top]
        while waiting and waiting[-1][0] == top:
            active.append(waiting.pop()[1:])
        for a, b in pairwise(_calm(top, bottom, [r for r, _ in active])):
            ranges = _kept(range(a, b), active, keeps)
            if ranges:
                yield range(a, b), ranges


def _calm(top: int, bottom: int, regions: Sequence[Region]) -> list[int]:
    """Cuts rows so that between two cuts no limit crosses or touches another."""
    fixed = {x for r in regions for x in (r.left, r.right) if x < FAR}
    moving = {r.lower for r in regions if r.lower > -FAR} | {
        r.upper + 1 for r in regions if r.upper < FAR
    }
    cuts = {x - by + more for x, by in product(fixed, moving) for more in (0, 1)}
    return [top, *sorted(x for x in cuts if top < x < bottom), bottom]


def _kept(
    strip: range, active: Sequence[tuple[Region, int]], keeps: Callable[[bool, bool], bool]
) -> list[_Range]:
    """The ranges of a strip that are kept, from left to right, none touching the next."""
    events: list[tuple[_Limit, int, int]] = []
    for region, whose in active:
        first, end = _limits(strip, region)
        if first.start < end.start:
            events += (first, whose, 1), (end, whose, -1)
    events.sort()
    found: list[_Range] = []
    count, begin = [0, 0], None
    for n, (limit, whose, change) in enumerate(events):
        count[whose] += change
        if n + 1 < len(events) and events[n + 1][0] == limit:
            continue
        shows = keeps(count[0] > 0, count[1] > 0)
        if shows and begin is None:
            begin = limit
        elif not shows and begin is not None:
            found.append((begin, limit))
            begin = None
    return found


def _limits(strip: range, region: Region) -> tuple[_Limit, _Limit]:
    """The columns, first and last + 1, that the rows of a strip see of a region."""
    # A strip of one row has no slopes, of others the second row tells.
    rows = strip.start, min(strip.start + 1, strip.stop - 1)
    firsts = [max(region.left, i + region.lower) for i in rows]
    ends = [min(region.right, i + region.upper + 1) for i in rows]
    return _Limit(firsts[0], firsts[1] - firsts[0]), _Limit(ends[0], ends[1] - ends[0])


class _Growing:
    """A layer that grows downwards: its regions, and which columns have been seen in it."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._starts: list[int] = []  # of runs of columns that have been seen, and their stops
        self._stops: list[int] = []
        self._stop = -1  # the row after the last, and what that one saw
        self._last = range(0)

    def overlap(self, strip: range, piece: _Range) -> int:
        """How many columns the row above sees that the first row of a piece sees too."""
        if self._stop != strip.start:
            return 0
        first, end = piece
        return max(0, min(end.start, self._last.stop) - max(first.start, self._last.start))

    def takes(self, strip: range, piece: _Range) -> bool:
        """Whether with the piece each row would see one range, and each column be seen by one."""
        if self._stop > strip.start:
            return False
        first, end = piece
        left, right = first.start, end.at(strip)
        # Columns that were seen before must be seen by the row above, and by the first one of the piece.
        low, high = bisect_right(self._stops, left), bisect_left(self._starts, right)
        if low >= high:
            return True
        seen = max(left, self._starts[low]), min(right, self._stops[high - 1])
        above = self._last if self._stop == strip.start else range(0)
        return high - low == 1 and above.start <= seen[0] and seen[1] <= min(above.stop, end.start)

    def add(self, strip: range, piece: _Range) -> None:
        """Adds a piece that it takes."""
        first, end = piece
        left, right = first.start, end.at(strip)
        low, high = bisect_left(self._stops, left), bisect_right(self._starts, right)
        start, stop = min([left, *self._starts[low:high]]), max([right, *self._stops[low:high]])
        self._starts[low:high], self._stops[low:high] = [start], [stop]
        self._stop, self._last = strip.stop, range(first.at(strip), right)
        region = _region(strip, piece)
        one = _one(self.regions[-1], region) if self.regions else None
        if one is None:
            self.regions.append(region)
        else:
            self.regions[-1] = one

    def finished(self) -> Regions:
        """The regions, with the columns that they see."""
        trimmed = (region.trimmed() for region in self.regions)
        return tuple(region for region in trimmed if region is not None)


def _deal(strip: range, ranges: Sequence[_Range], layers: list[_Growing]) -> None:
    """Gives each range of a strip to a layer: to one that goes on with it, else to any that takes it."""
    pairs = product(range(len(ranges)), range(len(layers)))
    wishes = sorted(((-layers[n].overlap(strip, ranges[m]), m, n) for m, n in pairs))
    placed: set[int] = set()
    for overlap, m, n in wishes:
        if overlap and m not in placed and layers[n].takes(strip, ranges[m]):
            layers[n].add(strip, ranges[m])
            placed.add(m)
    for m, piece in enumerate(ranges):
        if m not in placed:
            layer = next((x for x in layers if x.takes(strip, piece)), None)
            if layer is None:
                layers.append(layer := _Growing())
            layer.add(strip, piece)


def _region(strip: range, piece: _Range) -> Region:
    first, end = piece
    left, lower = (first.start, -FAR) if not first.slope else (0, first.start - strip.start)
    right, upper = (end.start, FAR) if not end.slope else (FAR, end.start - 1 - strip.start)
    return Region(strip.start, strip.stop, left, right, lower, upper)


def _one(above: Region, below: Region) -> Region | None:
    """The region that is both of two that follow each other, if there is one."""
    if above.bottom != below.top:
        return None
    both, row = (above, below), below.top
    # Of a single row nothing says whether a limit moves: it may, as far as the next row has it.
    by = max(below.left, row + below.lower) - row, min(below.right, row + below.upper + 1) - row - 1
    lefts = product((above.left, below.left, 0), (above.lower, below.lower, by[0]))
    rights = product((above.right, below.right, FAR), (above.upper, below.upper, by[1]))
    first = next(
        (x for x in lefts if all(_first(*x, r) == _first(r.left, r.lower, r) for r in both)), None
    )
    end = next(
        (x for x in rights if all(_end(*x, r) == _end(r.right, r.upper, r) for r in both)), None
    )
    if first is None or end is None:
        return None
    (left, lower), (right, upper) = first, end
    return Region(above.top, below.bottom, left, right, lower, upper)


def _first(left: int, lower: int, rows: Region) -> tuple[int | None, int | None]:
    """max(left, row + lower) in some rows, without the part that says nothing there."""
    if lower <= -FAR or rows.bottom - 1 + lower <= left:
        return left, None
    if rows.bottom - rows.top == 1:
        return rows.top + lower, None
    return (None, lower) if rows.top + lower >= left else (left, lower)


def _end(right: int, upper: int, rows: Region) -> tuple[int | None, int | None]:
    """min(right, row + upper + 1) in some rows, without the part that says nothing there."""
    if upper >= FAR or rows.top + upper + 1 >= right:
        return right, None
    if rows.bottom - rows.top == 1:
        return rows.top + upper + 1, None
    return (None, upper) if rows.bottom + upper <= right else (right, upper)
