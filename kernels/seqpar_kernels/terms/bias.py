"""`Bias`: a number is added to each score, by its row and column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.terms.table import Table, check_broadcasts, check_numbers
from seqpar_kernels.terms.term import Place, Spot

FORM = "[b hq i j]"


@dataclass(frozen=True, eq=False)
class Bias(Table):
    """The numbers by global position, `[b hq i j]`, or what broadcasts to it."""

    value: Float[Tensor, "*w"]

    name, words = "bias", "bias"

    @staticmethod
    def checked(value: Any) -> Tensor:
        """The numbers. Raises TypeError or ValueError if they are no floating point tensor of 1 to 4 dims."""
        return check_numbers("bias", value, f"{FORM} or what broadcasts to it", Bias.dims)

    def check_fits(self, shape: Sequence[int], lengths: tuple[int, int]) -> None:
        """Raises ValueError where it does not broadcast to the scores of a call."""
        check_broadcasts("bias", self.value, FORM, (shape[0], shape[2], *lengths))

    def looked_up(
        self, of: Float[Tensor, "_b _h _i _j"], place: Place
    ) -> Float[Tensor, "_b _h i j"]:
        """Those of the rows and columns at hand."""
        return of[self._at(of, place)]

    def add_(
        self, to: Float[Tensor, "_b _h _i _j"], ds: Float[Tensor, "_b _h i j"], place: Place
    ) -> None:
        """Adds to those of the rows and columns at hand, of which none comes twice."""
        alike = [dim for dim in (2, 3) if to.shape[dim] == 1 != ds.shape[dim]]
        to[self._at(to, place)] += ds.sum(alike, keepdim=True) if alike else ds

    def modify(self, s: Float[Tensor, ""], spot: Spot) -> Float[Tensor, ""]:
        """Adds to one score."""
        return s + self.one(spot.batch, spot.here, spot.row, spot.col).to(s.dtype)

    def _at(self, x: Tensor, place: Place) -> tuple[Any, ...]:
        # A tile goes on past the end of its block, and perhaps of the sequence, where nothing is visible.
        num_rows, num_cols = x.shape[2:]
        row = place.row.clamp(max=num_rows - 1) if num_rows > 1 else place.row[:1] * 0
        col = place.col.clamp(max=num_cols - 1) if num_cols > 1 else place.col[:1] * 0
        return slice(None), slice(None), row[:, None], col
