"""`Table`: what terms have in common that look up a number for each score and add it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqpar_kernels.terms.term import Place, ScoreTerm, Sums


@dataclass(frozen=True, eq=False)
class Table(ScoreTerm):
    """The numbers, whole on every rank, which may learn.

    `four` gives them as `[b hq _ _]`, where batch entries or heads may be 1: all then have the same.

    Args:
        dims: how many there are with batch entries and heads, which may be left out.
    """

    dims: ClassVar[int] = 4

    # docs/design.md: a bias is whole on every rank
    value: Float[Tensor, "*w"]

    has_sums = needs_positions = changes_scores = True

    @classmethod
    def by_heads(cls, x: Float[Tensor, "*w"]) -> Float[Tensor, "_b _h *w"]:
        """The numbers, or a sum of as many, with all dims."""
        return x if x.ndim == cls.dims else x[(None,) * (cls.dims - x.ndim)]

    @classmethod
    def four(cls, x: Float[Tensor, "*w"]) -> Float[Tensor, "_b _h _i _j"]:
        """The numbers, or a sum of as many, by batch entry and head."""
        return cls.by_heads(x)

    def looked_up(
        self, of: Float[Tensor, "_b _h _i _j"], place: Place
    ) -> Float[Tensor, "_b _h i j"]:
        """The number for each score of a place."""
        raise NotImplementedError

    def add_(
        self, to: Float[Tensor, "_b _h _i _j"], ds: Float[Tensor, "_b _h i j"], place: Place
    ) -> None:
        """Adds, where each score of a place has looked up its number, what is given for it."""
        raise NotImplementedError

    def one(self, *where: Int[Tensor, ""]) -> Float[Tensor, ""]:
        """One number, by its place in the dims that there are, the last ones."""
        # By one index for each dim, and nothing else: FlexAttention differentiates no more than that.
        places = where[len(where) - self.value.ndim :]
        sizes = self.value.shape
        return self.value[tuple(x if n > 1 else x * 0 for x, n in zip(places, sizes, strict=True))]

    def of_heads(self, heads: slice) -> Tensor:
        """Those of some heads, if heads differ."""
        whole = self.by_heads(self.value)
        return whole if whole.shape[1] == 1 else whole[:, heads]

    def scores_(self, s: Float[Tensor, "b hq i j"], place: Place) -> None:
        """Adds the numbers in the type of the scores."""
        mine = _of_batch(self.four(self.value), len(s), place)
        s.add_(self.looked_up(mine, place).to(s.dtype))

    def add_gradients_(
        self,
        ds: Float[Tensor, "b hq i j"],
        before: Tensor | None,  # noqa: ARG002 - what is added does not depend on it
        place: Place,
        sums: Sums,
    ) -> None:
        """Adds the gradients of scores, where batch entries or heads have the same numbers their sum."""
        for x, total in sums:
            if x is self.value:
                to = _of_batch(self.four(total), len(ds), place)
                alike = [dim for dim in (0, 1) if to.shape[dim] == 1 != ds.shape[dim]]
                self.add_(to, ds.sum(alike, keepdim=True) if alike else ds, place)


def _of_batch(x: Float[Tensor, "_b _h _i _j"], num: int, place: Place) -> Tensor:
    return x if x.shape[0] == 1 else x[place.batch : place.batch + num]


def check_numbers(name: str, value: Any, form: str, most: int) -> Tensor:
    """The value as a tensor of at most so many dims, and at least one.

    Raises:
        TypeError: it is not a floating point tensor.
        ValueError: it has more dims, or none.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor {form}, got {value!r}")
    if not 1 <= value.ndim <= most:
        raise ValueError(f"{name} must be {form}, got {tuple(value.shape)}")
    return value


def check_broadcasts(name: str, x: Tensor, form: str, expected: tuple[int, ...]) -> None:
    """Raises where numbers do not broadcast to this shape.

    Raises:
        ValueError: they do not.
    """
    pairs = zip(reversed(x.shape), reversed(expected), strict=False)
    if any(n not in (1, m) for n, m in pairs):
        raise ValueError(
            f"{name} must broadcast to {form} = {list(expected)}, got {tuple(x.shape)}"
        )


def check_finite(name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Raises where numbers are not finite in the type of scores. Another device is not waited for.

    Raises:
        ValueError: they are not.
    """
    # What a compiler traces with has no numbers.
    has_numbers = x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
    if has_numbers and not bool(torch.isfinite(x.detach().to(dtype)).all()):
        raise ValueError(
            f"{name} must be finite: to hide scores is for a mask, see seqpar.masks.dense"
        )
