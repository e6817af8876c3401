"""`Tile`s: the rectangles of scores where the rows of one rank meet the rows of another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from seqpar.layout.mask import Mask
from seqpar.layout.shards import Layout
from seqpar_kernels import Band


@dataclass(frozen=True)
class Tile:
    """Local query rows, the key rows of the owner they meet, and what they see of them.

    `row` and `col` are the positions of the first of each, `step` lies between neighbours.
    """

    rows: slice
    cols: slice
    band: Band
    row: int
    col: int
    step: int

    @property
    def work(self) -> int:
        """Number of visible scores."""
        return self.band.count(self.rows.stop - self.rows.start, self.cols.stop - self.cols.start)

    def continues_as(self, below: Tile) -> bool:
        """Whether this tile's band, drawn on over the rows of `below`, is what those rows see.

        Kernels are faster on one tall tile than on two: torch's bfloat16 backward of zigzag rank 0
        took 103 ms a step and not 115 to 123 (N = 2048, P = 2).
        """
        if self.cols != below.cols or self.rows.stop != below.rows.start:
            return False
        height, width = below.rows.stop - below.rows.start, below.cols.stop - below.cols.start
        drawn_on = self.band.at(self.rows.stop - self.rows.start, 0)
        both_full = drawn_on.is_full(height, width) and below.band.is_full(height, width)
        return both_full or drawn_on == below.band


def tiles(layout: Layout, mask: Mask, rank: int, owner: int) -> tuple[Tile, ...]:
    """The tiles of `rank`'s queries and `owner`'s keys in which anything is visible.

    Columns are visited from the last to the first.
    """
    met: list[Tile] = []
    for col_span, (cols, _) in reversed(
        list(zip(layout.spans[owner], layout.places(owner), strict=True))
    ):
        for row_span, (rows, _) in zip(layout.spans[rank], layout.places(rank), strict=True):
            band = mask.band(row_span, col_span)
            tile = Tile(rows, cols, band, row_span.start, col_span.start, row_span.step)
            if tile.work:
                met.append(tile)
    return tuple(met)


def joined_tiles(apart: Iterable[Tile]) -> tuple[Tile, ...]:
    """The same scores in fewer tiles: those whose bands continue each other are joined.

    The positions of a joined tile's rows need not be one progression, so it serves only where a band
    says all.
    """
    met: list[Tile] = []
    for tile in apart:
        if met and met[-1].continues_as(tile):
            met[-1] = replace(met[-1], rows=slice(met[-1].rows.start, tile.rows.stop))
        else:
            met.append(tile)
    return tuple(met)


def work(layout: Layout, mask: Mask) -> tuple[int, ...]:
    """Visible scores per rank when each attends its own rows to all keys: the ring's load balance."""
    ranks = range(layout.size)
    return tuple(
        sum(tile.work for owner in ranks for tile in tiles(layout, mask, rank, owner))
        for rank in ranks
    )
