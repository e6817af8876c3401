"""Attention of one block of query rows over one block of key rows, on one device.

Nothing here knows a rank, a group or a layout. A block is described by its tensors, a `Band` (which
columns each row sees) and a `Score`; results of several blocks meet in a `Partial`.
The mathematics is derived in `kernels/README.md`.
"""

from seqpar_kernels.band import Band
from seqpar_kernels.block import (
    IMPLEMENTATIONS,
    Implementation,
    Rows,
    attend,
    attend_backward,
    choose,
)
from seqpar_kernels.partial import Partial, accumulation_dtype
from seqpar_kernels.score import Score

__all__ = [
    "IMPLEMENTATIONS",
    "Band",
    "Implementation",
    "Partial",
    "Rows",
    "Score",
    "accumulation_dtype",
    "attend",
    "attend_backward",
    "choose",
]
