"""`Sinks`: one logit for each query head that takes part in the softmax and has no value.

Blocks never see it: it joins a row once, in `finish`. So it costs nothing per block and cannot be added
twice.
Source: Xiao et al. 2023 (arXiv:2309.17453); as a learned logit, gpt-oss 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.terms.term import ScoreTerm, check_per_head


@dataclass(frozen=True, eq=False)
class Sinks(ScoreTerm):
    """The logits, which may learn."""

    value: Float[Tensor, "hq"]

    name, words = "sinks", "sinks"
    joins = True

    @staticmethod
    def checked(value: Any) -> Tensor:
        """The logits. Raises TypeError or ValueError if they are no floating point tensor `[hq]`."""
        return check_per_head("sinks", value)

    def joined(self) -> Float[Tensor, "hq"]:
        """The logits themselves."""
        return self.value

    def joined_gradient(
        self, lse: Float[Tensor, "b i hq"], delta: Float[Tensor, "b i hq"]
    ) -> Float[Tensor, "b i hq"]:
        """A sink is a key whose value is zero, so its ds is p (0 - delta). `lse` has the sink in it."""
        shares = -(torch.exp(self.value.to(lse.dtype) - lse) * delta)
        return shares.masked_fill_(lse == -torch.inf, 0.0)
