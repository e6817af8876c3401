"""The arguments of a `Mask`, checked and as integers of Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Literal, cast, get_args

from torch import Tensor

from seqpar.layout.regions import Layers, layers_of
from seqpar_kernels import FAR, Ranges, Region
from seqpar_kernels.integers import is_integer
from seqpar_kernels.terms.ranges import check_bounds, counts

Align = Literal["top-left", "bottom-right"]
ALIGNS: tuple[Align, ...] = get_args(Align)
Bounds = tuple[int, ...]
Window = int | tuple[int | None, int | None] | None


def checked_documents(documents: object) -> Bounds | tuple[Bounds, Bounds]:
    """The boundaries of documents as tuples of Python's integers, or a pair of them."""
    both = tuple(cast("Sequence[object]", documents))
    if len(both) == 2 and all(hasattr(x, "__len__") and getattr(x, "ndim", 1) == 1 for x in both):
        of_q, of_k = (_integers(cast("Sequence[int]", x)) for x in both)
        check_bounds("documents of queries", of_q)
        check_bounds("documents of keys", of_k)
        if len(of_q) != len(of_k):
            raise ValueError(
                f"queries and keys must have the same number of documents, got boundaries {of_q} and {of_k}"
            )
        return of_q if of_q == of_k else (of_q, of_k)
    bounds = _integers(cast("Sequence[int]", documents))
    check_bounds("documents", bounds)
    return bounds


def checked_window(window: object) -> Window:
    """The window with `None` for open sides; of two open sides nothing is left."""
    if window is None:
        return None
    if isinstance(window, (tuple, list)) and len(window) == 2:
        sides = []
        for side in window:
            if side is not None and not is_integer(side):
                raise TypeError(f"the sides of a window must be integers or None, got {window!r}")
            if side is not None and side < -1:
                raise ValueError(
                    f"a side of a window must be 0 or more keys, or None or -1 for all, got {window!r}"
                )
            sides.append(None if side is None or side == -1 else int(side))
        left, right = sides
        return None if left is None and right is None else (left, right)
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(
            f"window must be an integer number of keys, a pair (left, right) or None, got {window!r}"
        )
    if window < 1:
        raise ValueError(
            f"window must be at least 1 (the row itself), got {window}; None means no window"
        )
    return window


def checked_layers(layers: Iterable[Iterable[Region]]) -> Layers:
    """Regions as layers.

    Raises:
        ValueError: a region is backwards or shows nothing in some row, a layer's rows or columns see several
            ranges, or layers overlap.
        TypeError: they are not regions of integers.
    """
    checked = Layers(regions for regions in map(tuple, layers) if regions)
    flat = tuple(chain.from_iterable(checked))
    for region in flat:
        if not isinstance(region, Region) or not all(map(is_integer, region)):
            raise TypeError(
                f"regions must be layers of seqpar_kernels.Region of integers, got {region!r}"
            )
        if min(region.top, region.left) < 0 or region.trimmed() != region:
            raise ValueError(
                f"a region must show something in each of its rows and columns, from 0 on, got {region}"
            )
    # As far as the last border and a row more, behind which nothing changes.
    end = 2 + max((abs(x) for region in flat for x in region if abs(x) < FAR), default=0) * 2
    for layer in checked:
        for above, below in pairwise(layer):
            if below.top < above.bottom:
                raise ValueError(
                    f"the rows of a layer must follow each other, got {above} before {below}"
                )
        turned = Ranges(layer).by_columns.regions
        if _count(layer, end) != _count(turned, end):
            raise ValueError(
                f"each column of a layer must be seen by rows that are neighbours, got {layer}"
            )
    union = layers_of(flat)
    if _count(flat, end) != _count([*chain.from_iterable(union)], end):
        raise ValueError(f"the layers of a mask must not overlap, got {tuple(checked)}")
    return checked


def _count(regions: Sequence[Region], end: int) -> int:
    """How many scores of so many rows and columns they show."""
    parts = (region.within(0, end, 0, end, 1) for region in regions)
    return sum(counts(filter(None, parts)))


def _integers(bounds: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Turns integers of NumPy or torch into Python's; leaves all else as it is, to be refused."""
    return tuple(int(b) if hasattr(b, "item") and b == int(b) else b for b in bounds)
