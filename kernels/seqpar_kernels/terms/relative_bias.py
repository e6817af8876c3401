"""`RelativeBias`: a number is added to each score, by how far its column is behind or ahead of its row.

Source: Shaw et al. 2018 (arXiv:1803.02155), clipped distances; Raffel et al. 2020, T5 (arXiv:1910.10683),
one number for each distance and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from seqpar_kernels.terms.table import Table, check_broadcasts, check_numbers
from seqpar_kernels.terms.term import Place, Spot

FORM = "[b hq 2*reach+1]"


@dataclass(frozen=True, eq=False)
class RelativeBias(Table):
    """The numbers of column - row from -reach to reach; those farther away have that of the end."""

    value: Float[Tensor, "*w"]

    name, words = "relative_bias", "relative bias"
    dims = 3
    compares_positions = True

    @staticmethod
    def checked(value: Any) -> Tensor:
        """The numbers. Raises TypeError or ValueError if they are no tensor of an odd number of distances."""
        form = f"{FORM}, or without batch entries or heads"
        check_numbers("relative_bias", value, form, RelativeBias.dims)
        if value.shape[-1] % 2 == 0:
            raise ValueError(
                f"relative_bias must be {form}, got an even number of distances, {tuple(value.shape)}"
            )
        return value

    @classmethod
    def four(cls, x: Float[Tensor, "*w"]) -> Float[Tensor, "_b _h 1 distances"]:
        """The numbers by batch entry and head."""
        return cls.by_heads(x).unsqueeze(2)

    def check_fits(self, shape: Sequence[int], lengths: tuple[int, int]) -> None:  # noqa: ARG002
        """Raises ValueError where it does not broadcast to the heads of a call."""
        distances = self.value.shape[-1]
        check_broadcasts("relative_bias", self.value, FORM, (shape[0], shape[2], distances))

    def looked_up(
        self, of: Float[Tensor, "_b _h 1 distances"], place: Place
    ) -> Float[Tensor, "_b _h i j"]:
        """Those of the distances between rows and columns."""
        return of[:, :, 0, _distances(of, place)]

    def modify(self, s: Float[Tensor, ""], spot: Spot) -> Float[Tensor, ""]:
        """Adds to one score."""
        reach = self.value.shape[-1] // 2
        distance = (spot.col - spot.row).clamp(-reach, reach) + reach
        return s + self.one(spot.batch, spot.here, distance).to(s.dtype)

    def add_(
        self, to: Float[Tensor, "_b _h 1 distances"], ds: Float[Tensor, "_b _h i j"], place: Place
    ) -> None:
        """Adds to those of the distances, one score after another."""
        to.squeeze(2).index_add_(2, _distances(to, place).flatten(), ds.flatten(2).to(to.dtype))


def _distances(x: Tensor, place: Place) -> Int[Tensor, "i j"]:
    reach = x.shape[-1] // 2
    return (place.col - place.row[:, None]).clamp_(-reach, reach) + reach
