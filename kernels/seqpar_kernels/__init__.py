"""Attention of one block of query rows over one block of key rows, on one device.

Nothing here knows a rank, a group or a layout. A block is described by its tensors, a `Block` (which columns
each row sees, and the score terms); results of several blocks meet in a `Partial`.
The mathematics is derived in `kernels/README.md`.
"""

from seqpar_kernels.band import Band
from seqpar_kernels.beginnings import Begins, first_touches
from seqpar_kernels.block import Block
from seqpar_kernels.choice import (
    DTYPES,
    IMPLEMENTATIONS,
    Implementation,
    Request,
    choose,
    needs_out,
    preference,
    refusal,
)
from seqpar_kernels.custom_ops import attention, attention_with_lse, recalled
from seqpar_kernels.derivatives import any_order, first_only
from seqpar_kernels.dispatch import attend, attend_backward, finish, tile_border
from seqpar_kernels.finite import may_hold_poison
from seqpar_kernels.layer import Layer
from seqpar_kernels.partial import Partial, accumulation_dtype
from seqpar_kernels.region import FAR, Region
from seqpar_kernels.rows import Rows, RunningGradients, Totals, sums_for
from seqpar_kernels.score import (
    BY_BLOCKS,
    TABLES,
    TENSORS,
    Score,
    finished_gradients,
    sum_rows,
    tables,
)
from seqpar_kernels.terms import TERMS, Dropout, MaskMod, Place, Ranges, ScoreMod, Term
from seqpar_kernels.whole import begin

__all__ = [
    "BY_BLOCKS",
    "DTYPES",
    "FAR",
    "IMPLEMENTATIONS",
    "TABLES",
    "TENSORS",
    "TERMS",
    "Band",
    "Begins",
    "Block",
    "Dropout",
    "Implementation",
    "Layer",
    "MaskMod",
    "Partial",
    "Place",
    "Ranges",
    "Region",
    "Request",
    "Rows",
    "RunningGradients",
    "Score",
    "ScoreMod",
    "Term",
    "Totals",
    "accumulation_dtype",
    "any_order",
    "attend",
    "attend_backward",
    "attention",
    "attention_with_lse",
    "begin",
    "choose",
    "finish",
    "finished_gradients",
    "first_only",
    "first_touches",
    "may_hold_poison",
    "needs_out",
    "preference",
    "recalled",
    "refusal",
    "sum_rows",
    "sums_for",
    "tables",
    "tile_border",
]
