"""`Score`: what happens to q.k before the softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Terms of the attention score, the same for every block of a call.

    Args:
        scale: factor on q.k; `None` means 1/sqrt(d). Kernels want a number: see `resolve`.

    Raises:
        ValueError: scale is not finite.
        TypeError: scale is not a number.
    """

    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is None:
            return
        if isinstance(self.scale, bool) or not isinstance(self.scale, (int, float)):
            raise TypeError(f"scale must be a number or None, got {self.scale!r}")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be finite, got {self.scale}")
        object.__setattr__(self, "scale", float(self.scale))  # so that 1 and 1.0 print alike

    def resolve(self, d: int) -> Score:
        """The same terms with the scale written out for vectors of width `d`."""
        return self if self.scale is not None else Score(scale=1.0 / math.sqrt(max(d, 1)))

    @property
    def factor(self) -> float:
        """The scale as a number; only a resolved score has one."""
        assert self.scale is not None, "strategies resolve the score before they call a kernel"
        return self.scale
