"""`Score`: what happens to q.k before the softmax, and the sink that joins it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Score:
    """Terms of the attention score, the same for every block of a call.

    Where slopes or sinks learn, make the score anew in every forward from the parameters: what replaces
    parameters (loading with `assign=True`, FSDP2, `functional_call`) cannot reach into a score made before.

    In this order::

        x = scale * q.k;   x = softcap * tanh(x / softcap);   score = x - slope * |row - column|

    Args:
        scale: factor on q.k; `None` means 1/sqrt(d). Kernels want a number: see `resolve`.
        softcap: scores are bent to stay inside (-softcap, softcap). Source: Gemma 2 (arXiv:2408.00118).
        alibi_slopes: `[hq]`, one per query head, on global positions; may learn. Source: Press et al.
            2021 (arXiv:2108.12409).
        sinks: `[hq]`, one logit per query head that takes part in the softmax and has no value; may
            learn. Source: Xiao et al. 2023 (arXiv:2309.17453); as a learned logit, gpt-oss 2025.

    Raises:
        ValueError: scale is not finite, softcap is not a positive number, slopes or sinks are not 1-D.
        TypeError: scale or softcap is not a number, slopes or sinks are not floating point tensors.
    """

    scale: float | None = None
    softcap: float | None = None
    alibi_slopes: Float[Tensor, "hq"] | None = None
    sinks: Float[Tensor, "hq"] | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number or None, got {value!r}")
            if not -math.inf < value < math.inf:
                raise ValueError(f"{name} must be finite, got {value}")
            object.__setattr__(self, name, float(value))  # so that 1 and 1.0 print alike
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}; None means no cap")
        for name in ("alibi_slopes", "sinks"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise TypeError(f"{name} must be a floating point tensor [hq], got {value!r}")
            if value.ndim != 1:
                raise ValueError(f"{name} must be 1-D, [hq], got {tuple(value.shape)}")

    def resolve(self, d: int) -> Score:
        """The same terms with the scale written out for vectors of width `d`."""
        return self if self.scale is not None else replace(self, scale=1.0 / math.sqrt(max(d, 1)))

    def of_heads(self, start: int, num_heads: int) -> Score:
        """The same terms for a range of the query heads."""
        heads = slice(start, start + num_heads)
        return self.with_tensors({name: x[heads] for name, x in self.tensors.items()})

    @property
    def tensors(self) -> dict[str, Float[Tensor, "hq"]]:
        """The terms that are tensors, which may learn, by name."""
        return {name: x for name in TENSORS if (x := getattr(self, name)) is not None}

    def with_tensors(self, tensors: Mapping[str, Tensor | None]) -> Score:
        """The same terms with other tensors, by name."""
        return replace(self, **tensors)  # type: ignore[arg-type]

    def without_tensors(self) -> Score:
        """The other terms alone, for what must not keep tensors alive."""
        return self.with_tensors(dict.fromkeys(TENSORS))

    def told(self, learns: Collection[str]) -> list[str]:
        """The terms in words.

        Args:
            learns: the tensors that get gradients, by name.
        """
        words = []
        for name, text in (("alibi_slopes", "ALiBi slopes"), ("sinks", "sinks")):
            if getattr(self, name) is not None:
                words.append(f"{text} that learn" if name in learns else text)
        if self.softcap is not None:
            words.insert(self.alibi_slopes is not None, f"softcap {self.softcap:g}")
        return words

    @property
    def bends(self) -> bool:
        """Whether the derivative of a score by scale * q.k differs from 1, and has to be kept with it."""
        return self.softcap is not None

    @property
    def needs_positions(self) -> bool:
        """Whether a score depends on where its row and column are, besides the band."""
        return self.alibi_slopes is not None

    @property
    def factor(self) -> float:
        """The scale as a number; only a resolved score has one."""
        assert self.scale is not None, "strategies resolve the score before they call a kernel"
        return self.scale

    @property
    def is_plain(self) -> bool:
        """Whether the score is scale * q.k and nothing else."""
        return self.softcap is None and self.alibi_slopes is None


TENSORS = ("alibi_slopes", "sinks")  # the fields of `Score` that are tensors `[hq]`
BY_BLOCKS = ("alibi_slopes",)  # of which each block gives a share of the gradient


def finished_gradients(
    score: Score,
    lse: Float[Tensor, "b i hq"],
    delta: Float[Tensor, "b i hq"],
    wanted: Collection[str],
) -> dict[str, Float[Tensor, "b i hq"]]:
    """Each row's share of the gradients of those tensors of a score that join in `finish`, by name."""
    if score.sinks is None or "sinks" not in wanted:
        return {}
    return {"sinks": sink_gradient_rows(score.sinks, lse, delta)}


def sink_gradient(
    sinks: Float[Tensor, "hq"], lse: Float[Tensor, "b i hq"], delta: Float[Tensor, "b i hq"]
) -> Float[Tensor, "hq"]:
    """These rows' share of the gradient of the sinks."""
    return sum_rows(sink_gradient_rows(sinks, lse, delta)).to(sinks.dtype)


def sink_gradient_rows(
    sinks: Float[Tensor, "hq"], lse: Float[Tensor, "b i hq"], delta: Float[Tensor, "b i hq"]
) -> Float[Tensor, "b i hq"]:
    """Each row's share of the gradient of its head's sink, in the type of lse.

    A sink is a key whose value is zero, so its ds is p (0 - delta). `lse` has the sink in it.
    """
    shares = -(torch.exp(sinks.to(lse.dtype) - lse) * delta)
    return shares.masked_fill_(lse == -torch.inf, 0.0)


def sum_rows(x: Float[Tensor, "b i hq"]) -> Float[Tensor, "hq"]:
    """The sum of every head's rows, the same bits whatever heads are with it."""
    sums = [
        x[:, :, head].clone(memory_format=torch.contiguous_format).sum()
        for head in range(x.shape[2])
    ]
    return torch.stack(sums) if sums else x.new_empty(0)
