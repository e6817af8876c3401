"""`Tile`s: the rectangles of scores where the rows of one rank meet the rows of another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from seqpar.layout.mask import Mask
from seqpar.layout.shards import Layout
from seqpar.layout.spans import Span
from seqpar.layout.visible import sees, visible_count
from seqpar_kernels import Band, Layer


@dataclass(frozen=True)
class Tile:
    """A rectangle of scores: local query rows, the key rows of an owner that they meet, and what they see.

    `row` and `col` are the positions of the first of each, `step` lies between neighbours.
    """

    rows: slice
    cols: slice
    band: Band
    row: int
    col: int
    step: int

    def continues_as(self, below: Tile) -> bool:
        """Whether this tile's band, drawn on over the rows of `below`, is what those rows see.

        Kernels are faster on one tall tile than on two: torch's bfloat16 backward of zigzag rank 0
        took 103 ms a step and not 115 to 123 (N = 2048, P = 2).
        """
        if self.cols != below.cols or self.rows.stop != below.rows.start:
            return False
        (height, width), drawn_on = below.shape, self.band.at(self.shape[0], 0)
        both_full = drawn_on.is_full(height, width) and below.band.is_full(height, width)
        return both_full or drawn_on == below.band

    def widens_to(self, right: Tile) -> bool:
        """Whether this tile's band, drawn on over the columns of `right`, is what its rows see of them.

        The rows of `right` may be the last of this tile's, where those above them then see nothing of the new
        columns. A zigzag rank's own rows and keys are one causal tile so, as those of one device are.
        """
        above = right.rows.start - self.rows.start
        if self.cols.stop != right.cols.start or self.rows.stop != right.rows.stop or above < 0:
            return False
        (height, width), old_width = right.shape, self.shape[1]
        drawn_on = self.band.at(above, old_width)
        both_full = drawn_on.is_full(height, width) and right.band.is_full(height, width)
        hidden_above = self.band.at(0, old_width).count(above, width) == 0
        return hidden_above and (both_full or drawn_on == right.band)

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and columns it has."""
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start


def tiles(
    rows: tuple[Span, ...], cols: tuple[Span, ...], mask: Mask, layer: Layer
) -> tuple[Tile, ...]:
    """The tiles of the query rows of some spans and the keys of others in which a layer of a mask shows any.

    Rows and columns are held in the order of their spans. Columns are visited from the last to the first.
    """
    met: list[Tile] = []
    # Downwards, as kernels walk their tiles: the order of additions then follows from positions.
    for cols_at, col_span in reversed(list(held(cols))):
        for rows_at, row_span in held(rows):
            place = mask.place(row_span, col_span)
            if layer.sees(*place):
                row, _, col, _, step = place
                met.append(Tile(rows_at, cols_at, layer.band(row, col, step), row, col, step))
    return tuple(met)


def meets(rows: tuple[Span, ...], cols: tuple[Span, ...], *masks: Mask) -> bool:
    """Whether any of the rows sees any of the columns by any of the masks."""
    return any(sees(mask, r, c) for mask in masks for r in rows for c in cols)


def held(spans: Sequence[Span]) -> Iterator[tuple[slice, Span]]:
    """Yields each span and where its positions are, held one span after the other."""
    start = 0
    for span in spans:
        yield slice(start, start + span.length), span
        start += span.length


def part(spans: Sequence[Span], rows: slice) -> tuple[Span, ...]:
    """The positions of some of the rows that spans hold."""
    parts = []
    for at, span in held(spans):
        first, stop = max(rows.start, at.start), min(rows.stop, at.stop)
        if first < stop:
            start = span.start + (first - at.start) * span.step
            parts.append(Span(start, stop - first, span.step))
    return tuple(parts)


def tall_tiles(
    rows: tuple[Span, ...], cols: tuple[Span, ...], mask: Mask, layer: Layer
) -> tuple[Tile, ...]:
    """The tiles that `tiles` gives, joined where one continues another."""
    return joined_tiles(tiles(rows, cols, mask, layer))


def joined_tiles(apart: tuple[Tile, ...]) -> tuple[Tile, ...]:
    """Joins tiles whose bands continue each other: the same scores in fewer tiles.

    The positions of a joined tile's rows need not be one progression, so it serves only where a band
    says all.
    """
    tall: list[Tile] = []
    for tile in apart:
        # docs/design.md: tiles that continue each other are joined
        if tall and tall[-1].continues_as(tile):
            tall[-1] = replace(tall[-1], rows=slice(tall[-1].rows.start, tile.rows.stop))
        else:
            tall.append(tile)
    met: list[Tile] = []
    for tile in tall:  # from the last columns to the first
        if met and tile.widens_to(met[-1]):
            met[-1] = replace(tile, cols=slice(tile.cols.start, met[-1].cols.stop))
        else:
            met.append(tile)
    return tuple(met)


def work(layout: Layout, mask: Mask) -> tuple[int, ...]:
    """Counts the scores that each rank's rows see of all keys: the ring's load balance."""
    everything = [span for spans in layout.spans for span in spans]
    return tuple(
        sum(visible_count(mask, row, col) for row in spans for col in everything)
        for spans in layout.spans
    )
