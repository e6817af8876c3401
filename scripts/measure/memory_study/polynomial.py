"""Memory as a polynomial in N: the nearest one, and the longest N that fits."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch


@dataclass(frozen=True)
class Fit:
    """bytes = sum of coefficients[n] * N**n, none negative; `misfit` is the worst relative one."""

    coefficients: tuple[float, ...]
    misfit: float

    def at(self, length: float) -> float:
        """The bytes at a length."""
        return sum(c * length**n for n, c in enumerate(self.coefficients))


def fit(points: Sequence[tuple[int, int]], degree: int) -> Fit:
    """The polynomial in N nearest to (N, bytes) of those that have no negative coefficient.

    Nearest by the squares of the relative distances, so that all lengths count alike.

    Raises:
        ValueError: fewer than `degree` + 1 points.
    """
    if len(points) <= degree:
        raise ValueError(f"a fit of degree {degree} takes {degree + 1} lengths, got {len(points)}")
    lengths, peaks = torch.tensor(points, dtype=torch.float64).unbind(1)
    system = lengths[:, None] ** torch.arange(degree + 1) / peaks[:, None]
    size = system.amax(0)  # columns of one size keep it well conditioned
    found: list[tuple[float, Fit]] = []
    for num_lower in range(degree + 1):
        for kept in ([*lower, degree] for lower in combinations(range(degree), num_lower)):
            solution = torch.linalg.lstsq(
                system[:, kept] / size[kept], torch.ones_like(peaks)[:, None]
            ).solution[:, 0]
            coefficients = torch.zeros_like(size)
            coefficients[kept] = solution / size[kept]
            off = system @ coefficients - 1
            if bool((coefficients >= 0).all()):
                fitted = Fit(tuple(coefficients.tolist()), float(off.abs().max()))
                found.append((float(off @ off), fitted))
    return min(found, key=lambda pair: pair[0])[1]


def longest(fitted: Fit, memory_bytes: float) -> int:
    """The longest N whose fitted bytes fit the memory; 0 if none does."""
    return max(0, bisect.bisect_right(range(2**40), memory_bytes, key=fitted.at) - 1)
