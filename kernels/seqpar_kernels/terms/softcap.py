"""`Softcap`: x becomes c tanh(x / c), so that scores stay inside (-c, c).

Source: Gemma 2 (arXiv:2408.00118).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.terms.term import Place, ScoreTerm, Spot, check_number


@dataclass(frozen=True, eq=False)
class Softcap(ScoreTerm):
    """The cap on scores, a positive number."""

    value: float

    name, words = "softcap", "softcap"
    arguments = MappingProxyType({"flash_attn": "softcap"})
    kernels = "seqpar_kernels.terms.softcap_triton"
    changes_scores = bends = True

    @staticmethod
    def checked(value: Any) -> float:
        """The cap as a float. Raises TypeError or ValueError if it is not a positive number."""
        value = check_number("softcap", value)
        if value <= 0:
            raise ValueError(f"softcap must be positive, got {value}; None means no cap")
        return value

    def told(self, learns: bool = False) -> str:  # noqa: ARG002 - a number does not learn
        """The cap in words."""
        return f"softcap {self.value:g}"

    def scores_(self, s: Float[Tensor, "b hq i j"], place: Place) -> Float[Tensor, "b hq i j"]:  # noqa: ARG002
        """Bends scores in place. Gives 1 - tanh^2."""
        s.div_(self.value).tanh_()
        slope = s.square().neg_().add_(1.0)
        s.mul_(self.value)
        return slope

    def modify(self, s: Float[Tensor, ""], spot: Spot) -> Float[Tensor, ""]:  # noqa: ARG002
        """Bends one score."""
        return self.value * torch.tanh(s / self.value)

    def values(self) -> tuple[float]:
        """The cap."""
        return (self.value,)
