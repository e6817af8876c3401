"""Masks of one batch stand in one place: rows are as far from keys in all of them."""

from __future__ import annotations

from seqpar.layout.mask import Mask
from seqpar.layout.regions import Layers
from seqpar_kernels import FAR, Region


def aligned_together(
    masks: tuple[Mask, ...], num_rows: int, num_cols: int, *, positions: bool
) -> tuple[Mask, ...]:
    """Masks for sequences of these lengths, all with the same shift; see `Mask.aligned`.

    Raises:
        ValueError: it matters where rows stand, and a mask does not say, or they say differently.
    """
    aligned = [mask.aligned(num_rows, num_cols, positions=positions) for mask in masks]
    shifts = {mask.shift for mask in aligned}
    away = shifts - {(0, 0)}
    said = {mask.align for mask in masks if mask.align is not None}
    if away and len(said) > 1:
        raise ValueError(f"the masks of a batch must be aligned alike, got {sorted(said)}")
    if len(shifts) == 1:
        return tuple(aligned)
    (shift,) = away
    return tuple(mask if mask.shift == shift else _moved(mask, *shift) for mask in aligned)


def _moved(mask: Mask, by_row: int, by_col: int) -> Mask:
    """A mask that is not shifted as one that is: rows and keys are counted from elsewhere."""
    by = by_col - by_row
    regions = Layers(
        tuple(
            Region(
                *(x + by_row if 0 < x < FAR else x for x in (r.top, r.bottom)),
                *(x + by_col if 0 < x < FAR else x for x in (r.left, r.right)),
                *(x + by if abs(x) < FAR else x for x in (r.lower, r.upper)),
            )
            for r in layer.regions
        )
        for layer in mask.layers
    )
    return Mask(
        regions=regions, lengths=mask.lengths, mask_mod=mask.mask_mod, shift=(by_row, by_col)
    )
