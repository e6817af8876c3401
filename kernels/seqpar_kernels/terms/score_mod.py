"""`ScoreMod`: a function of each score, as FlexAttention's `score_mod`; what it holds may learn.

Source: He et al. 2024, FlexAttention (arXiv:2412.05496).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.terms.modifiers import Modifier, apart, as_it_is, described, evaluate
from seqpar_kernels.terms.term import Place, ScoreTerm, Spot, Sums


@dataclass(frozen=True, eq=False)
class ScoreMod(ScoreTerm):
    """A function (score, batch, head, row, column) -> score of 0-dimensional tensors."""

    value: Modifier

    name, words = "score_mod", "score_mod"
    needs_positions = compares_positions = changes_scores = bends = asks_each = has_sums = True

    @staticmethod
    def checked(value: Any) -> Modifier:
        """The function. Raises TypeError if it is none."""
        if not callable(value):
            raise TypeError(f"score_mod must be a function or None, got {value!r}")
        return as_it_is(value)

    def told(self, learns: bool = False) -> str:
        """The function by name."""
        return f"score_mod {described(self.value).split()[0]}" + " that learns" * learns

    def scores_(self, s: Float[Tensor, "b hq i j"], place: Place) -> Float[Tensor, "b hq i j"]:
        """Changes scores in place. Gives the derivative of each by what it was."""
        if s.device.type == "meta" or s.numel() == 0:
            return torch.ones_like(s)
        with apart():
            before = s.detach().clone().requires_grad_()
            after = evaluate(self.value, before, s, place).to(s.dtype)
            # A function may leave the score out.
            slope = None
            if after.requires_grad:
                (slope,) = torch.autograd.grad(after.sum(), before, allow_unused=True)
        s.copy_(after.detach())
        return torch.zeros_like(s) if slope is None else slope.contiguous()

    def modify(self, s: Float[Tensor, ""], spot: Spot) -> Float[Tensor, ""]:
        """Asks the function."""
        return self.value(s, spot.batch, spot.head, spot.row, spot.col)

    def add_gradients_(
        self,
        ds: Float[Tensor, "b hq i j"],
        before: Float[Tensor, "b hq i j"] | None,
        place: Place,
        sums: Sums,
    ) -> None:
        """Adds to the gradients of tensors that the function holds, which is asked again."""
        if before is None or ds.device.type == "meta" or ds.numel() == 0:
            return
        with apart():
            after = evaluate(self.value, before.detach(), before, place).to(ds.dtype)
        if not after.requires_grad:
            return
        held = [x for x, _ in sums]
        grads = torch.autograd.grad(after, held, ds, allow_unused=True)
        for (_, total), grad in zip(sums, grads, strict=True):
            if grad is not None:
                total += grad
