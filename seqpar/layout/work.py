"""The work of rows, in keys that they see, and where a sequence may be cut so that nobody sees across."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from seqpar.layout.mask import Mask
from seqpar_kernels import Layer
from seqpar_kernels.region import band_between


class Work:
    """The work of a layer before any position, which takes one region to find."""

    def __init__(self, layer: Layer, length: int) -> None:
        self._parts = []
        for top, bottom, left, right, lower, upper in layer.regions:
            height, width = min(bottom, length) - top, min(right, length) - left
            if height > 0:
                band = band_between(lower, upper, top, left, 1)
                self._parts.append((band, top, height, max(0, width)))
        self._tops = [top for _, top, _, _ in self._parts]
        works = (band.count(height, width) for band, _, height, width in self._parts)
        self._before = list(accumulate(works, initial=0))

    def before(self, position: int) -> int:
        """The work of the rows before a position."""
        n = bisect_right(self._tops, position) - 1
        if n < 0:
            return 0
        band, top, height, width = self._parts[n]
        if position >= top + height:
            return self._before[n + 1]
        return self._before[n] + band.count(position - top, width)


def cuts(masks: Sequence[Mask], length: int) -> list[int]:
    """The positions, from 0 to the length, across which no row sees a key, as between documents."""
    reach = []
    for region in (r for mask in masks for layer in mask.layers for r in layer.regions):
        left, right = region.columns
        first, end = min(region.top, left), min(max(region.bottom, right), length)
        if first < end:
            reach.append((first, end))
    found: list[int] = []
    end = 0
    for first, stop in sorted(reach):
        # Between two reaches lie positions that see nothing, and that nobody sees.
        found += range(end, first + 1) if first >= end else ()
        end = max(end, stop)
    found += range(end, length + 1)
    return sorted({0, length, *found})
