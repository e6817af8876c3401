"""The score terms, one file each, and their list. Other modules ask terms what they do and name none."""

from seqpar_kernels.terms.alibi import Alibi
from seqpar_kernels.terms.bias import Bias
from seqpar_kernels.terms.dropout import Dropout
from seqpar_kernels.terms.mask_mod import MaskMod
from seqpar_kernels.terms.ranges import Ranges
from seqpar_kernels.terms.relative_bias import RelativeBias
from seqpar_kernels.terms.score_mod import ScoreMod
from seqpar_kernels.terms.sinks import Sinks
from seqpar_kernels.terms.softcap import Softcap
from seqpar_kernels.terms.term import Place, ScoreTerm, Spot, Sums, Term, check_number

# docs/design.md: a term is one file
# In the order in which they are applied. What bends scores comes before what learns in each block, since
# gradients of learned tensors are taken from those of the finished scores.
TERMS: tuple[type[Term], ...] = (
    Softcap, ScoreMod, Bias, RelativeBias, Alibi, Ranges, MaskMod, Sinks, Dropout,
)  # fmt: skip

__all__ = [
    "TERMS",
    "Dropout",
    "MaskMod",
    "Place",
    "Ranges",
    "ScoreMod",
    "ScoreTerm",
    "Spot",
    "Sums",
    "Term",
    "check_number",
]
