"""`Tile`s: the rectangles of scores where the rows of one rank meet the rows of another."""

from __future__ import annotations

from dataclasses import dataclass

from seqpar_kernels import Band

from seqpar.layout.mask import Mask
from seqpar.layout.shards import Layout


@dataclass(frozen=True)
class Tile:
    """Local query rows, the key rows of the owner they meet, and what they see of them."""

    rows: slice
    cols: slice
    band: Band

    @property
    def work(self) -> int:
        """Number of visible scores."""
        return self.band.count(self.rows.stop - self.rows.start, self.cols.stop - self.cols.start)


def tiles(layout: Layout, mask: Mask, rank: int, owner: int) -> tuple[Tile, ...]:
    """The tiles of `rank`'s queries and `owner`'s keys in which anything is visible.

    For each run of rows, columns are visited from the last to the first.
    """
    met = [
        Tile(rows, cols, mask.band(row_span, col_span))
        for row_span, (rows, _) in zip(layout.spans[rank], layout.places(rank), strict=True)
        for col_span, (cols, _) in reversed(
            list(zip(layout.spans[owner], layout.places(owner), strict=True))
        )
    ]
    return tuple(tile for tile in met if tile.work)


def work(layout: Layout, mask: Mask) -> tuple[int, ...]:
    """Visible scores per rank when each attends its own rows to all keys: the ring's load balance."""
    ranks = range(layout.size)
    return tuple(
        sum(tile.work for owner in ranks for tile in tiles(layout, mask, rank, owner))
        for rank in ranks
    )
