"""`Budget`: how far a result may be from float64, and why that much.

float64: the order of summation, 1e-11 of the largest value or of 1. Lower precision: twice the error
of dense one-device attention in that precision, plus one rounding step of the terms that are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.testing import oracle

EXACT = 1e-11


@dataclass(frozen=True)
class Budget:
    """Expected (out, dq, dk, dv) in float64 and the largest absolute error allowed in each."""

    expected: tuple[Tensor, ...]
    allowed: tuple[float, ...]

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, seen: Tensor, scale: float) -> Budget:
        """The budget for attention over whole tensors `[b s h d]`, in the precision they come in."""
        wide = q.double(), k.double(), v.double(), dout.double()
        expected = oracle.with_gradients(*wide, seen, scale)
        if q.dtype == torch.float64:
            return Budget(expected, tuple(EXACT * max(1.0, largest(e)) for e in expected))
        terms = oracle.magnitudes(*wide, seen, scale)
        dense = oracle.with_gradients(q, k, v, dout, seen, scale)
        step = torch.finfo(q.dtype).eps
        errors = (max_error(d, e) for d, e in zip(dense, expected, strict=True))
        return Budget(expected, tuple(2 * e + step * m for e, m in zip(errors, terms, strict=True)))


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
