"""The work of rows, in keys that they see, and where a sequence may be cut so that nobody sees across."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from seqpar.layout.mask import Mask
from seqpar_kernels import Band, Layer
from seqpar_kernels.region import band_between


class Work:
    """The work of a layer before any position, which takes one region to find."""

    def __init__(self, layer: Layer, length: int) -> None:
        self._parts, bands = [], dict[tuple[int, int, int], Band]()
        for top, bottom, left, right, lower, upper in layer.regions:
            height, width = min(bottom, length) - top, min(right, length) - left
            if height > 0:
                # Documents have one band.
                key = lower, upper, left - top
                if (band := bands.get(key)) is None:
                    band = bands[key] = band_between(lower, upper, top, left, 1)
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
        if position == top:
            return self._before[n]
        if position >= top + height:
            return self._before[n + 1]
        return self._before[n] + band.count(position - top, width)


def cuts(masks: Sequence[Mask], length: int) -> list[int]:
    """Positions, from 0 to the length, across which no row sees a key, such as those between documents."""
    reach = []
    for region in (r for mask in masks for layer in mask.layers for r in layer.regions):
        left, right = region.columns
        first, end = min(region.top, left), min(max(region.bottom, right), length)
        if first < end:
            reach.append((first, end))
    found, end = {0, length}, 0
    for first, stop in sorted(reach):
        # Of positions between, which see nothing and which nobody sees, the ends will do.
        found |= {end, first} if first >= end else set()
        end = max(end, stop)
    return sorted(found | {end})
