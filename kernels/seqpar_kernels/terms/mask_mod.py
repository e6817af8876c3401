"""`MaskMod`: a function that says of each score whether it is visible, as FlexAttention's `mask_mod`.

Source: He et al. 2024, FlexAttention (arXiv:2412.05496).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from seqpar_kernels.terms.modifiers import Modifier, evaluate
from seqpar_kernels.terms.term import Place, Term


@dataclass(frozen=True)
class MaskMod(Term):
    """A function (batch, head, row, column) -> whether visible, of 0-dimensional tensors."""

    value: Modifier

    name, words = "mask_mod", "mask_mod"
    needs_positions = hides = asks_each = True

    def shows(self, s: Tensor, place: Place) -> Bool[Tensor, "b hq i j"]:
        """True where a row sees a column.

        Args:
            s: of the batch entries, heads, rows and columns at hand.
        """
        if s.device.type == "meta":
            return torch.ones_like(s, dtype=torch.bool)
        with torch.no_grad():
            return evaluate(self.value, None, s, place)
