"""Where rows stand over keys that are another number, as masks say it, alone and joined."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from seqpar.layout.mask_arguments import Align, Bounds
from seqpar_kernels import FAR, Layer

if TYPE_CHECKING:
    from seqpar.layout.mask import Mask

Shift = tuple[int, int]


def shift_of(mask: Mask, num_rows: int, num_cols: int, *, positions: bool) -> Shift:
    """How far rows, and how far keys, are from where a mask counts them; see `Mask.aligned`.

    Raises:
        ValueError: it matters where they stand, and the mask does not say.
    """
    if mask.pair is not None:
        _check_documents(mask, *mask.pair, positions=positions)
        return mask.shift
    if num_rows == num_cols or not (mask.depends_on_place or positions):
        return 0, 0
    if mask.align is None:
        raise ValueError(_unsaid("there are", num_rows, num_cols))
    # Both end at the same position, or both begin there: no position is negative.
    apart = num_cols - num_rows if mask.align == "bottom-right" else 0
    if apart < 0 and mask.regions is not None and any(map(_bounds_keys, mask.layers)):
        raise ValueError(
            f"over {num_cols} keys, fewer than the {num_rows} rows, 'bottom-right' counts keys from "
            "where the first row is, and the mask has ranges of them: say it with align='top-left'"
        )
    return max(apart, 0), max(-apart, 0)


def common_place(ours: Mask, theirs: Mask) -> tuple[Align | None, tuple[int, int] | None]:
    """(align, lengths) of two masks that are joined.

    Raises:
        ValueError: they say differently, or it matters where rows stand, and one does not say.
    """
    masks = ours, theirs
    aligns = {_placed(mask).align for mask in masks} - {None}
    if len(aligns) > 1:
        raise ValueError(
            f"masks must be aligned alike to be joined, got {sorted(map(str, aligns))}"
        )
    lengths = {mask.lengths for mask in masks} - {None}
    if len(lengths) > 1:
        raise ValueError(
            f"masks must be for the same lengths to be joined, got {ours.lengths} and {theirs.lengths}"
        )
    both_are = next(iter(lengths), None)
    if both_are is not None and both_are[0] != both_are[1] and any(map(_is_unplaced, masks)):
        raise ValueError(_unsaid("one of the masks is for", *both_are))
    return next(iter(aligns), None), both_are


def _check_documents(mask: Mask, of_q: Bounds, of_k: Bounds, *, positions: bool) -> None:
    if positions and of_q != of_k:
        raise ValueError(
            "ALiBi, a relative bias and a score_mod count positions of the whole sequence, and documents of "
            "other lengths for queries and keys have no common ones: attend to such documents one by one"
        )
    if mask.align is not None or not mask.depends_on_place:
        return
    for n, (num_rows, num_cols) in enumerate(zip(_lengths(of_q), _lengths(of_k), strict=True)):
        if num_rows != num_cols:
            raise ValueError(_unsaid(f"document {n} has", num_rows, num_cols))


def _placed(mask: Mask) -> Mask:
    """The mask. If it has documents of two sequences it says where rows stand, which is where they are."""
    if mask.pair is None:
        return mask
    of_q, of_k = mask.pair
    return replace(mask.aligned(of_q[-1], of_k[-1]), align="top-left")


def _bounds_keys(layer: Layer) -> bool:
    """Whether a layer has ranges of keys, besides diagonals."""
    return any(
        region.left > max(0, region.top + region.lower) or region.right < FAR
        for region in layer.regions
    )


def _is_unplaced(mask: Mask) -> bool:
    """Whether it matters where rows stand, and the mask does not say."""
    return mask.pair is None and mask.depends_on_place and mask.align is None


def _unsaid(where: str, num_rows: int, num_cols: int) -> str:
    return (
        f"{where} {num_rows} query and {num_cols} key positions: say where the rows of a causal mask, a "
        "window, a range of rows, ALiBi or a relative bias stand. Mask(align='top-left') has row 0 over key "
        "0, align='bottom-right' the last row over the last key"
    )


def _lengths(bounds: Bounds) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(bounds))
