"""`Alibi`: a score loses slope * |row - column|, on global positions, with one slope for each query head.

Source: Press et al. 2021 (arXiv:2108.12409).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.terms.term import Place, ScoreTerm, Spot, check_per_head


@dataclass(frozen=True, eq=False)
class Alibi(ScoreTerm):
    """The slopes, which may learn."""

    value: Float[Tensor, "hq"]

    name, words = "alibi_slopes", "ALiBi"
    lacking = "does not add ALiBi on global positions"
    kernels = "seqpar_kernels.terms.alibi_triton"
    needs_positions = compares_positions = changes_scores = True

    @staticmethod
    def checked(value: Any) -> Tensor:
        """The slopes. Raises TypeError or ValueError if they are no floating point tensor `[hq]`."""
        return check_per_head("alibi_slopes", value)

    def told(self, learns: bool = False) -> str:
        """The slopes in words."""
        return "ALiBi slopes that learn" if learns else "ALiBi slopes"

    def scores_(self, s: Float[Tensor, "b hq i j"], place: Place) -> None:
        """Subtracts, with no more memory than the distances take."""
        s.addcmul_(self._slopes(s), place.distance(s.dtype), value=-1)

    def tile_scores_(self, s: Float[Tensor, "b hq i j"], place: Place) -> None:
        """Rounds the product before it subtracts: whether `addcmul_` does depends on the shape."""
        s.sub_(self._slopes(s) * place.distance(s.dtype))

    def gradient(self, ds: Float[Tensor, "b hq i j"], place: Place) -> Float[Tensor, "b hq i"]:
        """-sum of ds * |row - column| over the columns of each row."""
        return -(ds * place.distance(ds.dtype)).sum(-1)

    def modify(self, s: Float[Tensor, ""], spot: Spot) -> Float[Tensor, ""]:
        """Subtracts from one score."""
        return s - self.value[spot.here].to(s.dtype) * (spot.row - spot.col).abs()

    def values(self) -> tuple[Tensor]:
        """The slopes."""
        return (self.value.float().contiguous(),)

    def _slopes(self, s: Tensor) -> Float[Tensor, "hq 1 1"]:
        return self.value.to(s.dtype)[:, None, None]
