"""`Budget`: how far a result may be from float64, and why that much.

float64: the order of summation, 1e-11 of the largest value or of 1. Lower precision: twice the error
of dense one-device attention in that precision, plus one rounding step of the terms that are summed,
plus one float32 rounding step of the exponents: weights are recomputed as exp(score - lse).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.testing import oracle

EXACT = 1e-11


@dataclass(frozen=True)
class Budget:
    """Expected results in float64 and the largest absolute error allowed in each.

    The results are (out, dq, dk, dv), then the gradients of what learns, if any, as `oracle.LEARNED` has it.
    """

    expected: tuple[Tensor, ...]
    allowed: tuple[float, ...]

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seen: Tensor, terms: oracle.Terms
    ) -> Budget:
        """The budget for attention over whole tensors `[b s h d]`, in the precision they come in."""
        wide = q.double(), k.double(), v.double(), dout.double()
        wide_terms = terms.changed(torch.Tensor.double)
        expected = oracle.with_gradients(*wide, seen, wide_terms)
        if q.dtype == torch.float64:
            return Budget(expected, tuple(EXACT * max(1.0, largest(e)) for e in expected))
        dense = oracle.with_gradients(q, k, v, dout, seen, terms)
        p = oracle.weights(wide[0], wide[1], seen, wide_terms)
        exponents = oracle.scores(wide[0], wide[1], wide_terms).abs()
        sums = oracle.magnitudes(*wide, p, wide_terms)
        powers = oracle.magnitudes(*wide, p * exponents, wide_terms)
        step, float32_step = torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps
        allowed = (
            2 * max_error(d, e) + step * t + float32_step * x
            for d, e, t, x in zip(dense, expected, sums, powers, strict=True)
        )
        return Budget(expected, tuple(allowed))


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 if there is none."""
    return float(x.abs().max()) if x.numel() else 0.0


def max_error(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; infinite where something is not finite."""
    if got.shape != expected.shape:
        raise AssertionError(f"got {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - expected.double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())
