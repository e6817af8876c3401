"""`Score`: what happens to q.k before the softmax and beside it. The public record, which names its terms."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, reduce

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.terms import TERMS, ScoreTerm, check_number
from seqpar_kernels.terms.modifiers import Modifier, captured


@dataclass(frozen=True, eq=False)
class Score:
    """Terms of the attention score, the same for every block of a call.

    Where slopes or sinks learn, make the score anew in every forward from the parameters: what replaces
    parameters (loading with `assign=True`, FSDP2, `functional_call`) cannot reach into a score made before.

    In this order::

        x = scale * q.k;   x = softcap * tanh(x / softcap);   x = score_mod(x, batch, head, row, column)
        score = x + bias + relative_bias - slope * |row - column|

    Args:
        scale: factor on q.k; `None` means 1/sqrt(d). Kernels want a number: see `resolve`.
        softcap: scores are bent to stay inside (-softcap, softcap). Source: Gemma 2 (arXiv:2408.00118).
        bias: `[b hq s skv]` or what broadcasts to it, added to scores by global position; whole on every
            rank, finite, may learn. `reference`, `flex` and stored scores do it.
        relative_bias: `[hq 2*reach+1]`, or without heads, or with batch entries first: added by how far the
            column is from the row, from -reach to reach and at the ends all that is farther. As `bias`
            otherwise. Source: T5 (arXiv:1910.10683); its buckets and other ones
            are in `seqpar.biases`.
        alibi_slopes: `[hq]`, one per query head, on global positions; may learn. Source: Press et al.
            2021 (arXiv:2108.12409).
        sinks: `[hq]`, one logit per query head that takes part in the softmax and has no value; may
            learn. Source: Xiao et al. 2023 (arXiv:2309.17453); as a learned logit, gpt-oss 2025.
        score_mod: a function as FlexAttention takes it, of 0-dimensional tensors, on global positions and
            heads, as it is when the score is made: what it holds is looked up then. Tensors that it holds may
            learn: their gradients are shares, as those of slopes. It and its derivatives must be finite, also
            where scores are hidden. `reference`, `flex` and stored scores do it. Source: He et al. 2024
            (arXiv:2412.05496).

    Raises:
        ValueError: scale is not finite, softcap is not a positive number, slopes or sinks are not 1-D, a bias
            has too many dims, or a relative one an even number of distances, or they are one tensor.
        TypeError: scale or softcap is not a number, slopes, sinks or biases are not floating point tensors.
    """

    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Float[Tensor, "hq"] | None = None
    sinks: Float[Tensor, "hq"] | None = None
    score_mod: Modifier | None = None
    bias: Float[Tensor, "*w"] | None = None
    relative_bias: Float[Tensor, "*w"] | None = None

    def __post_init__(self) -> None:
        if self.scale is not None:
            object.__setattr__(self, "scale", check_number("scale", self.scale))
        for kind in _NAMED:
            value = getattr(self, kind.name)
            if value is not None:
                object.__setattr__(self, kind.name, kind.checked(value))
        if self.bias is not None and self.bias is self.relative_bias:
            raise ValueError(
                "bias and relative_bias must be two tensors: give a clone() of one of them"
            )

    @cached_property
    def terms(self) -> tuple[ScoreTerm, ...]:
        """What is done besides the scale, in the order in which it is applied."""
        return tuple(
            kind(value) for kind in _NAMED if (value := getattr(self, kind.name)) is not None
        )

    @property
    def captured(self) -> tuple[Tensor, ...]:
        """The tensors that its function uses and that learn, whole on every rank."""
        held = () if self.score_mod is None else captured(self.score_mod)
        return tuple(x for x in held if x.requires_grad)

    def resolve(self, d: int) -> Score:
        """The same terms with the scale written out for vectors of width `d`."""
        return self if self.scale is not None else replace(self, scale=1.0 / math.sqrt(max(d, 1)))

    def of_heads(self, start: int, num_heads: int) -> Score:
        """The same terms for a range of the query heads."""
        heads = slice(start, start + num_heads)
        cut = {term.name: term.of_heads(heads) for term in self.terms if term.name in TENSORS}
        return self.with_tensors(cut) if cut else self

    @property
    def tensors(self) -> dict[str, Float[Tensor, "*w"]]:
        """The terms that are tensors, which may learn, by name."""
        return {name: x for name in TENSORS if (x := getattr(self, name)) is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor | None]) -> Score:
        """The same terms with other tensors, by name."""
        return replace(self, **tensors)  # type: ignore[arg-type]

    def without_tensors(self) -> Score:
        """The other terms alone, for what must not keep tensors alive."""
        return self.with_tensors(dict.fromkeys(TENSORS)) if self.tensors else self

    def told(self, learns: Collection[str]) -> list[str]:
        """The terms in words.

        Args:
            learns: the tensors that get gradients, by name.
        """
        return [term.told(term.name in learns) for term in self.terms]

    @property
    def bends(self) -> bool:
        """Whether the derivative of a score by scale * q.k differs from 1, and has to be kept with it."""
        return any(term.bends for term in self.terms)

    @property
    def needs_positions(self) -> bool:
        """Whether a score depends on where its row and column are, besides the band."""
        return any(term.needs_positions for term in self.terms)

    @property
    def factor(self) -> float:
        """The scale as a number; only a resolved score has one."""
        assert self.scale is not None, "strategies resolve the score before they call a kernel"
        return self.scale

    def joined(self) -> Float[Tensor, "hq"] | None:
        """The logits that take part in the softmax of a row once, and have no value; `None` without any."""
        logits = [term.joined() for term in self.terms if term.joins]
        return None if not logits else reduce(torch.logaddexp, logits)


_FIELDS = {field.name for field in fields(Score)}
_NAMED: tuple[type[ScoreTerm], ...] = tuple(
    kind for kind in TERMS if issubclass(kind, ScoreTerm) and kind.name in _FIELDS
)
# The fields of `Score` that are tensors, those of them of which blocks give each row's share of gradients,
# and those whose gradients are sums of their shape.
_OF_TENSORS = tuple(
    kind for kind in _NAMED if not kind.asks_each and [t for t, _ in kind.schema()] == ["Tensor?"]
)
TENSORS = tuple(kind.name for kind in _OF_TENSORS)
BY_BLOCKS = tuple(kind.name for kind in _OF_TENSORS if not (kind.joins or kind.has_sums))
TABLES = tuple(kind.name for kind in _OF_TENSORS if kind.has_sums)


def finished_gradients(
    score: Score,
    lse: Float[Tensor, "b i hq"],
    delta: Float[Tensor, "b i hq"],
    wanted: Collection[str],
) -> dict[str, Float[Tensor, "b i hq"]]:
    """Each row's share of the gradients of those tensors of a score that join in `finish`, by name."""
    return {
        term.name: term.joined_gradient(lse, delta)
        for term in score.terms
        if term.joins and term.name in wanted
    }


def tables(score: Score, wanted: Collection[str]) -> dict[str, Tensor]:
    """Those tensors of a score whose gradients are sums of their shape, by name."""
    return {name: x for name, x in score.tensors.items() if name in wanted and name in TABLES}


def sum_rows(x: Float[Tensor, "b i hq"]) -> Float[Tensor, "hq"]:
    """The sum of every head's rows, the same bits whatever heads are with it."""
    sums = [
        x[:, :, head].clone(memory_format=torch.contiguous_format).sum()
        for head in range(x.shape[2])
    ]
    return torch.stack(sums) if sums else x.new_empty(0)
