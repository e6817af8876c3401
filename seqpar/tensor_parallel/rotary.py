"""`Rotary`: rotary position embeddings of q and k, whole or partial, in halves or interleaved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

Angles = tuple[Float[Tensor, "b sl pairs"], Float[Tensor, "b sl pairs"]]


@dataclass(frozen=True)
class Rotary:
    """Turns pairs of the first `dim` components of every head by angles that grow with the position.

    Args:
        dim: how many components turn; the others stay.
        interleaved: whether neighbours are a pair, as in GPT-J, CodeGen and ChatGLM, or component i and
            i + dim / 2, as in GPT-NeoX and Llama.
        base: pair i of position p is turned by p * base ** (-2 i / dim).

    Raises:
        ValueError: dim is not a positive even number, or base not positive.

    Source: Su et al. 2021, RoFormer (arXiv:2104.09864), section 3.
    """

    dim: int
    interleaved: bool = False
    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2 or self.base <= 0:
            raise ValueError(
                f"rotary takes a positive even dim and a positive base, got {self.dim} and {self.base}"
            )

    def angles(self, positions: Int[Tensor, "*b sl"]) -> Angles:
        """(cos, sin) of every pair at these positions, `[.. sl dim/2]`, in float64."""
        pairs = torch.arange(0, self.dim, 2, dtype=torch.float64, device=positions.device)
        turns = positions.double().unsqueeze(-1) * self.base ** (-pairs / self.dim)
        return turns.cos(), turns.sin()

    def turn(self, x: Float[Tensor, "b sl h d"], angles: Angles) -> Float[Tensor, "b sl h d"]:
        """The same heads with their first `dim` components turned, in the type of x."""
        cos, sin = (a.to(x.dtype).unsqueeze(-2) for a in angles)  # [.. sl 1 pairs]
        turning, rest = x.split([self.dim, x.shape[-1] - self.dim], -1)
        pairs = (
            "b s h (i two) -> two b s h i" if self.interleaved else "b s h (two i) -> two b s h i"
        )
        one, two = rearrange(turning, pairs, two=2)
        turned = torch.stack([one * cos - two * sin, two * cos + one * sin])
        back = rearrange(turned, " -> ".join(reversed(pairs.split(" -> "))))
        return torch.cat([back, rest], -1)
