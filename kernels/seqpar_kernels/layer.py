"""`Layer`: what a mask shows in one walk over keys: a band, inside of ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.region import FAR, Region, band_between, of_rows
from seqpar_kernels.terms import Place, Ranges, Term
from seqpar_kernels.terms.ranges import Part, counts, parts_of


@dataclass(frozen=True)
class Layer:
    """The row at position i sees the key at position j iff lower <= j - i <= upper, inside of its range.

    The layers of a mask are disjoint. Rows attend to one after another, as to several blocks.
    """

    lower: int = -FAR
    upper: int = FAR
    ranges: Ranges | None = None

    @staticmethod
    def of(regions: Sequence[Region]) -> Layer:
        """The layer of some regions, see `Ranges`; the diagonals that all have are its own."""
        lower, upper = min(r.lower for r in regions), max(r.upper for r in regions)
        if len(regions) == 1 and regions[0] == Region(lower=lower, upper=upper):
            return Layer(lower, upper)
        inner = (
            r._replace(
                lower=-FAR if r.lower == lower else r.lower,
                upper=FAR if r.upper == upper else r.upper,
            )
            for r in regions
        )
        return Layer(lower, upper, Ranges(tuple(inner)))

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """All that is visible, with all diagonals."""
        if self.ranges is None:
            return (Region(lower=self.lower, upper=self.upper),)
        return tuple(
            r._replace(lower=max(r.lower, self.lower), upper=min(r.upper, self.upper))
            for r in self.ranges.regions
        )

    def of_rows(self, row: int, last_row: int) -> tuple[Region, ...]:
        """The regions that have some of these rows."""
        return self.regions[of_rows(self.regions, row, last_row)]

    @property
    def terms(self) -> tuple[Term, ...]:
        """What hides scores besides the band, as kernels take it."""
        return () if self.ranges is None else (self.ranges,)

    def visible(self, place: Place) -> Bool[Tensor, "i j"]:
        """True where a row sees a column."""
        ahead = place.col - place.row[:, None]
        seen = (ahead >= self.lower) & (ahead <= self.upper)
        return seen if self.ranges is None else seen & self.ranges.visible(place)

    def band(self, row: int, col: int, step: int) -> Band:
        """The band as seen by a block at these positions; ranges are not in it."""
        return band_between(self.lower, self.upper, row, col, step)

    def parts(self, row: int, num_rows: int, col: int, num_cols: int, step: int) -> Iterator[Part]:
        """(rows, columns, band) of parts of a block that hold all that is visible in it, none of it twice."""
        band = self.band(row, col, step)
        return parts_of(band, self.ranges, row, num_rows, col, num_cols, step)

    def count(self, row: int, num_rows: int, col: int, num_cols: int, step: int) -> int:
        """How many scores of a block are visible."""
        return sum(counts(self.parts(row, num_rows, col, num_cols, step)))

    def sees(self, row: int, num_rows: int, col: int, num_cols: int, step: int) -> bool:
        """Whether any score of a block is visible; stops at the first part with one."""
        return any(counts(self.parts(row, num_rows, col, num_cols, step)))
