"""Layouts say who holds which positions, masks what these may see: integers only, no communication.

A sharding is a set of arithmetic progressions of global positions (`Span`); two spans meet in a
rectangle of scores whose visibility is one `Band`. Kernels and strategies never ask for more.
"""

from seqpar.layout.balance import balanced
from seqpar.layout.fits import check_local, check_rows, check_size, check_whole
from seqpar.layout.heads import HeadSegment, HeadSplit, split_heads
from seqpar.layout.kinds import LayoutKind, check_kind, layout_of
from seqpar.layout.marks import check_mark, mark
from seqpar.layout.mask import CAUSAL, Mask
from seqpar.layout.shards import LAYOUTS, Layout, contiguous, striped, whole, zigzag
from seqpar.layout.spans import Span, joined
from seqpar.layout.tiles import Tile, held, joined_tiles, meets, part, tall_tiles, tiles, work
from seqpar.layout.visible import sees, visible_count

__all__ = [
    "CAUSAL",
    "LAYOUTS",
    "HeadSegment",
    "HeadSplit",
    "Layout",
    "LayoutKind",
    "Mask",
    "Span",
    "Tile",
    "balanced",
    "check_kind",
    "check_local",
    "check_mark",
    "check_rows",
    "check_size",
    "check_whole",
    "contiguous",
    "held",
    "joined",
    "joined_tiles",
    "layout_of",
    "mark",
    "meets",
    "part",
    "sees",
    "split_heads",
    "striped",
    "tall_tiles",
    "tiles",
    "visible_count",
    "whole",
    "work",
    "zigzag",
]
