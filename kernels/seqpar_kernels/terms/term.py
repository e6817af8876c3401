"""`Term`: one thing that is done to scores besides the scale, as all layers ask for it.

A term is one file beside this one and one entry of `TERMS`. Each hook has a default that leaves scores
alone, so that a term overrides what it does and nothing else. Docs: `docs/adding.md`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Tensors whose gradients are sums of their shape, each with the sum.
Sums = Sequence[tuple[Tensor, Tensor]]

# How the fields of a term are arguments of an op, by their annotation. A term may be absent.
_ARGUMENTS = {
    "float": "float?",
    "int": "int?",
    "tuple[int, ...]": "int[]?",
    "Float[Tensor, 'hq']": "Tensor?",
    "Float[Tensor, '*w']": "Tensor?",
}


@dataclass(frozen=True, eq=False)
class Place:
    """Where scores are in the whole attention.

    Args:
        row, col: global positions of the rows and columns at hand, int64.
        head: which of all query heads is the first at hand.
        batch: which batch entry is.
    """

    row: Int[Tensor, "i"]
    col: Int[Tensor, "j"]
    head: int
    batch: int = 0

    def distance(self, dtype: torch.dtype) -> Float[Tensor, "i j"]:
        """How many positions lie between each row and each column."""
        return (self.row[:, None] - self.col).abs().to(dtype)


class Spot(NamedTuple):
    """Where one score is, 0-dimensional tensors.

    Args:
        batch, row, col: of the whole attention.
        head: of all query heads.
        here: which of the heads at hand it is.
    """

    batch: Tensor
    head: Tensor
    here: Tensor
    row: Tensor
    col: Tensor


@dataclass(frozen=True)
class Term:
    """What is done to the scores of all blocks of a call. Its fields are its parameters.

    Args:
        name: of the term where users name it: the field of `Score`, `Plan` or `Mask` that holds it.
        words: what it is called in messages.
        lacking: what implementations lack that do not know it, as the end of a sentence that begins with
            their name; by default "has no" and its words. They lack nothing of what only hides.
        arguments: by implementation, the argument of a foreign op that takes its value.
        kernels: the module of its Triton functions, which `docs/adding.md` lists; imported when a kernel is
            launched.
        needs_positions: whether it depends on where rows and columns are, besides the band.
        compares_positions: whether it matters how far rows are from columns.
        changes_scores: whether a visible score is more than scale * q.k.
        bends: whether the derivative of the score by scale * q.k differs from 1.
        hides: whether it makes scores invisible.
        drops: whether it multiplies the weights.
        joins: whether it takes part in each row once, in `finish`, and never in a block.
        has_sums: whether gradients of what it holds are sums over scores, of the shape of what is held, and
            not a share of each row.
        asks_each: whether it is a function that is asked of each score: no op takes it as an argument, and
            only positions of the sequence may be asked of.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    lacking: ClassVar[str | None] = None
    arguments: ClassVar[Mapping[str, str]] = MappingProxyType({})
    kernels: ClassVar[str | None] = None
    needs_positions: ClassVar[bool] = False
    compares_positions: ClassVar[bool] = False
    changes_scores: ClassVar[bool] = False
    bends: ClassVar[bool] = False
    hides: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    has_sums: ClassVar[bool] = False
    asks_each: ClassVar[bool] = False

    @classmethod
    def is_in_kernels(cls) -> bool:
        """Whether Triton kernels do what it does in blocks: by its functions, or by limits alone."""
        return cls.kernels is not None or not (cls.changes_scores or cls.drops or cls.asks_each)

    @property
    def acts(self) -> bool:
        """Whether it does anything with these parameters."""
        return True

    def told(self, learns: bool = False) -> str:
        """The term in words."""
        return f"{self.words} that learn" if learns else self.words

    # On scores, in each block.

    def scores_(
        self, s: Float[Tensor, "b hq i j"], place: Place
    ) -> Float[Tensor, "b hq i j"] | None:
        """Changes scores in place. Gives their derivative by what they were, or `None` for 1."""
        raise NotImplementedError(f"{type(self).__name__} does not change scores")

    def tile_scores_(
        self, s: Float[Tensor, "b hq i j"], place: Place
    ) -> Float[Tensor, "b hq i j"] | None:
        """As `scores_`, with bits that do not depend on where a tile is cut; it may take more memory."""
        return self.scores_(s, place)

    def modify(self, s: Float[Tensor, ""], spot: Spot) -> Float[Tensor, ""]:
        """What one score becomes, as a function that FlexAttention compiles."""
        raise NotImplementedError(f"{type(self).__name__} is no function of one score")

    def gradient(self, ds: Float[Tensor, "b hq i j"], place: Place) -> Float[Tensor, "b hq i"]:
        """Each row's share of the gradient of a learned tensor, from that of the scores it gave."""
        raise NotImplementedError(f"nothing of {type(self).__name__} is learned in blocks")

    def add_gradients_(
        self,
        ds: Float[Tensor, "b hq i j"],
        before: Float[Tensor, "b hq i j"] | None,
        place: Place,
        sums: Sums,
    ) -> None:
        """Adds what scores give to the gradients of what it holds, from those of the scores that it gave.

        Args:
            before: the scores that it was given, if it is a function that learns.
            sums: those of all terms; what is not its own is left alone.
        """
        raise NotImplementedError(f"{type(self).__name__} holds nothing that learns")

    # On what is visible.

    def visible(self, place: Place) -> Bool[Tensor, "i j"]:
        """True where a row sees a column."""
        raise NotImplementedError(f"{type(self).__name__} hides nothing")

    # On weights.

    def multiplier(
        self, batch: Int[Tensor, "..."], head: Int[Tensor, "..."], place: Place, dtype: torch.dtype
    ) -> Float[Tensor, "..."]:
        """What weights `[... i j]` are multiplied by. Batch and head broadcast against `[i j]`."""
        raise NotImplementedError(f"{type(self).__name__} leaves weights alone")

    # On rows, once.

    def joined(self) -> Float[Tensor, "hq"]:
        """The logit that takes part in the softmax of each row of a head, and has no value."""
        raise NotImplementedError(f"{type(self).__name__} does not join rows")

    def joined_gradient(
        self, lse: Float[Tensor, "b i hq"], delta: Float[Tensor, "b i hq"]
    ) -> Float[Tensor, "b i hq"]:
        """Each row's share of the gradient of what is learned, in the type of lse."""
        raise NotImplementedError(f"{type(self).__name__} does not join rows")

    # In the Triton kernels.

    def values(self) -> tuple[float | Tensor, ...]:
        """What its Triton functions take: floats, and float32 tensors that are contiguous."""
        raise NotImplementedError(f"{type(self).__name__} has no Triton functions")

    def whole(self) -> tuple[int, int] | None:
        """Two more values that are integers, which only one term may have.

        Kernels take them apart: of integers in a tuple Triton compiles those that are 1, or divisible by 16,
        anew.
        """
        return None

    # As arguments of an op, which takes neither terms nor absent ones.

    @classmethod
    def schema(cls) -> Iterator[tuple[str, str]]:
        """(type in torch's schema, name) of each argument."""
        for n, field in enumerate(fields(cls)):
            yield _ARGUMENTS[str(field.type)], f"{cls.name}{n or ''}"

    def written(self) -> list[Any]:
        """The values of `schema`."""
        values = (getattr(self, field.name) for field in fields(self))
        return [list(x) if isinstance(x, tuple) else x for x in values]

    @classmethod
    def read(cls, values: Collection[Any]) -> Term | None:
        """The term that was `written`; `None` if there was none."""
        if any(x is None for x in values):
            return None
        return cls(*(tuple(x) if isinstance(x, list) else x for x in values))


def check_number(name: str, value: object) -> float:
    """The value as a finite float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)  # so that 1 and 1.0 print alike


def check_per_head(name: str, value: object) -> Tensor:
    """The value as a tensor with one entry for each query head.

    Raises:
        TypeError: it is not a floating point tensor.
        ValueError: it is not 1-D.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor [hq], got {value!r}")
    if value.ndim != 1:
        raise ValueError(f"{name} must be 1-D, [hq], got {tuple(value.shape)}")
    return value


@dataclass(frozen=True, eq=False)
class ScoreTerm(Term):
    """A term that `Score` names, whose field holds the value itself. The value is checked there."""

    value: Any

    @staticmethod
    def checked(value: Any) -> Any:
        """The value, if it is legal.

        Raises:
            TypeError, ValueError: it is not.
        """
        raise NotImplementedError

    def of_heads(self, heads: slice) -> Tensor:
        """The tensor for some of the query heads."""
        return self.value[heads]

    def check_fits(self, shape: Sequence[int], lengths: tuple[int, int]) -> None:  # noqa: ARG002
        """Raises where a tensor is not for such queries, or not for such lengths of queries and keys.

        Args:
            shape: of q, `[b sl hq d]`.

        Raises:
            ValueError: it is not.
        """
        if self.value.shape[0] != shape[2]:
            raise ValueError(
                f"{self.name} must have one entry for each of the {shape[2]} query heads, "
                f"got {tuple(self.value.shape)}"
            )
