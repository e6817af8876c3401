"""`Partial`: the running, un-normalised softmax of some query rows over the keys met so far.

It starts as the identity, every block of keys continues it, and `finish` normalises once, so the
rounding error of a row does not grow with the number of blocks it was computed in.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of running sums for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which products keep the type of what they multiply. Meta tensors have no autocast."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True)
class Partial:
    """For each row: m = max of scores, l = sum of exp(score - m), acc = sum of exp(score - m) v.

    `acc` is `[b i hq vd]`, `m` and `l` are `[b i hq]`, float32 or wider. A row that has seen nothing
    holds acc = 0, m = -inf, l = 0. Slices are views: what is merged into a slice lands here.
    """

    acc: Float[Tensor, "*batch vd"]
    m: Float[Tensor, "*batch"]
    l: Float[Tensor, "*batch"]

    @staticmethod
    def identity(q: Float[Tensor, "b i hq d"], vd: int) -> Partial:
        """The partial of the rows of `q` before they have seen any key."""
        empty = Partial.empty(q, vd)
        empty.reset_()
        return empty

    @staticmethod
    def empty(q: Float[Tensor, "b i hq d"], vd: int) -> Partial:
        """A partial of the rows of `q` that holds nothing yet, to be written."""
        shape, dtype = q.shape[:-1], accumulation_dtype(q.dtype)
        acc, m, l = (
            torch.empty(size, dtype=dtype, device=q.device) for size in ((*shape, vd), shape, shape)
        )
        return Partial(acc, m, l)

    def reset_(self) -> None:
        """Makes it the partial of rows that have seen nothing."""
        self.acc.zero_()
        self.m.fill_(float("-inf"))
        self.l.zero_()

    def __getitem__(self, where: slice | tuple[slice, slice]) -> Partial:
        """A view of some rows, or of some batch entries and rows."""
        at = where if isinstance(where, tuple) else (slice(None), where)
        return Partial(self.acc[at], self.m[at], self.l[at])

    def merge_(
        self,
        acc: Float[Tensor, "*batch vd"],
        m: Float[Tensor, "*batch"],
        l: Float[Tensor, "*batch"] | None = None,
    ) -> None:
        """Adds another partial of the same rows, in place. Every row of the other has seen a key.

        A normalised result (out, lse) is the partial acc = out, m = lse, l = 1, which is what `l`
        left out stands for.
        """
        top = torch.maximum(self.m, m)
        keep, add = torch.exp(self.m - top), torch.exp(m - top)
        self.acc.mul_(keep.unsqueeze(-1)).addcmul_(acc.to(self.acc.dtype), add.unsqueeze(-1))
        self.l.mul_(keep).add_(add if l is None else l * add)
        self.m.copy_(top)

    def absorb_(self, other: Partial) -> None:
        """Merges another partial of the same rows, in place. Rows of either may have seen nothing."""
        seen = other.l > 0
        self.merge_(other.acc, other.m.where(seen, torch.finfo(other.m.dtype).min), other.l)
        self.m.masked_fill_(self.l == 0, float("-inf"))

    def finish(
        self, dtype: torch.dtype | None = None, joined: Float[Tensor, "h"] | None = None
    ) -> tuple[Float[Tensor, "*batch vd"], Float[Tensor, "*batch"]]:
        """Normalises, in place: (out, lse). A row that saw nothing gives out = 0, lse = -inf.

        Args:
            dtype: of `out`; by default that of the sums.
            joined: one logit for each head, which adds its exponential to the sum: lse has it in it.
        """
        if joined is None:
            lse = torch.log(self.l).add_(self.m)
            out = self.acc.div_(self.l.masked_fill(self.l == 0, 1.0).unsqueeze(-1))
        else:
            joined = joined.to(self.m.dtype)
            top = torch.maximum(self.m, joined)
            top = torch.where(top == -torch.inf, 0.0, top)
            keep = torch.exp(self.m - top)
            total = self.l * keep + torch.exp(joined - top)
            lse = torch.log(total).add_(top)
            seen = total.masked_fill(total == 0, 1.0)
            out = self.acc.mul_(keep.unsqueeze(-1)).div_(seen.unsqueeze(-1))
        return out.to(dtype or out.dtype), lse
