"""`Dropout`: which attention weights are dropped, as a function of where they are and a seed.

The generator is counter based, so that no state is kept and no mask stored: forward and backward, every
implementation, strategy and number of ranks see the same mask.
Source: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, Philox 4x32 with 7 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqpar_kernels.terms.term import Place, Term

ROUNDS = 7  # the fewest that passed every test of BigCrush in the source
_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout(Term):
    """Drops each weight with probability `p` and divides the others by 1 - p.

    The counter is (column, row, head, batch), the key is the seed. Columns, rows and heads are global, the
    batch is that of the tensors: give every layer, step and data-parallel replica another seed, and the
    ranks that share a sequence the same.

    Raises:
        ValueError: p is outside [0, 1) or the seed outside [0, 2**63).
        TypeError: p is not a number or the seed not an integer.
    """

    p: float
    seed: int

    name, words = "dropout", "dropout"
    lacking = "cannot drop weights by their global position"
    kernels = "seqpar_kernels.terms.dropout_triton"
    needs_positions = drops = True

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, (int, float)):
            raise TypeError(f"p must be a number, got {self.p!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {self.seed!r}")
        if not 0 <= self.p < 1:
            raise ValueError(f"p must be in [0, 1), got {self.p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        object.__setattr__(self, "p", float(self.p))

    @property
    def acts(self) -> bool:
        """Whether any weight may be dropped."""
        return self.p > 0

    def told(self, learns: bool = False) -> str:  # noqa: ARG002 - nothing of it learns
        """The probability. The seed is left out: it may be new in every step."""
        return f"dropout {self.p:g}"

    def multiplier(
        self, batch: Int[Tensor, "..."], head: Int[Tensor, "..."], place: Place, dtype: torch.dtype
    ) -> Float[Tensor, "..."]:
        """Zero for weights that are dropped, and `factor` for the others."""
        keeps = self.keeps(batch, head, place.row[:, None], place.col)
        return keeps.to(dtype) * self.factor

    def values(self) -> tuple[float]:
        """The factor."""
        return (self.factor,)

    def whole(self) -> tuple[int, int]:
        """The seed and the threshold."""
        return self.seed, self.threshold

    @property
    def threshold(self) -> int:
        """A weight is kept if its 32 random bits, read as an integer, reach this."""
        return min(round(self.p * 2**32), _WORD)

    @property
    def factor(self) -> float:
        """What kept weights are multiplied by."""
        return 1 / (1 - self.p)

    def keeps(
        self,
        batch: Int[Tensor, "..."],
        head: Int[Tensor, "..."],
        row: Int[Tensor, "..."],
        col: Int[Tensor, "..."],
    ) -> Bool[Tensor, "..."]:
        """Whether the weights at these global places are kept; the arguments broadcast."""
        return philox(self.seed, col, row, head, batch) >= self.threshold


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Int[Tensor, "..."]:
    """The first of the four 32-bit words of Philox 4x32 for these counters, as int64."""
    key = [seed & _WORD, seed >> 32]
    c0, c1, c2, c3 = torch.broadcast_tensors(*(c.long() & _WORD for c in (c0, c1, c2, c3)))
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = (
            _multiply(c0, _MULTIPLIERS[0]),
            _multiply(c2, _MULTIPLIERS[1]),
        )
        c0, c1, c2, c3 = high1 ^ c1 ^ key[0], low1, high0 ^ c3 ^ key[1], low0
        key = [(k + w) & _WORD for k, w in zip(key, _WEYL, strict=True)]
    return c0


def _multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """High and low word of a product of two words. int64 cannot hold it at once."""
    upper, lower = x * (by >> 16), x * (by & 0xFFFF)  # each below 2**48
    low = ((upper & 0xFFFF) << 16) + lower
    return (upper >> 16) + (low >> 32), low & _WORD
