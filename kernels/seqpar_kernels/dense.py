"""Scores that are stored: what is done to them where given rows and columns meet, and products with them.

Rows and columns are any global positions in any order, named one by one, where a `Block` is cut from
progressions. Matrices are `[b hq i j]`, in float32 or wider. The softmax over them is `row_softmax`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import product

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.partial import accumulation_dtype, without_autocast
from seqpar_kernels.score import Score
from seqpar_kernels.terms import Place, Term


@dataclass(frozen=True, eq=False)
class Cells:
    """Part of a score matrix: its rows and columns by position, and what is done to the scores.

    Args:
        place: of the rows, columns and query heads at hand, on the device of the scores.
        band: row i sees column j iff band.lower <= col[j] - row[i] <= band.upper.
        score: of all query heads, with the scale resolved.
        terms: what is done besides the score.
    """

    place: Place
    band: Band
    score: Score
    terms: tuple[Term, ...] = ()

    @cached_property
    def acting(self) -> tuple[Term, ...]:
        """All terms that do something, in the order in which they are applied."""
        return tuple(term for term in (*self.score.terms, *self.terms) if term.acts)

    def visible(self) -> Bool[Tensor, "i j"]:
        """True where a row sees a column."""
        ahead = self.place.col - self.place.row[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if self.band.lower is not None:
            seen &= ahead >= self.band.lower
        if self.band.upper is not None:
            seen &= ahead <= self.band.upper
        for term in self.acting:
            if term.hides:
                seen &= term.visible(self.place)
        return seen


def scores_(
    x: Float[Tensor, "b hq i j"], cells: Cells
) -> tuple[Float[Tensor, "b hq i j"], Float[Tensor, "b hq i j"] | None]:
    """Turns products q.k into scores, in place; hidden ones become -inf.

    Returns:
        The scores, and where terms bend them their derivative by scale * q.k.
    """
    bend = None
    x.mul_(cells.score.factor)
    for term in cells.acting:
        if term.changes_scores:
            slope = term.scores_(x, cells.place)
            bend = _product(bend, slope)
    return x.masked_fill_(~cells.visible(), -torch.inf), bend


def product_gradient_(
    ds: Float[Tensor, "b hq i j"], bend: Float[Tensor, "b hq i j"] | None, cells: Cells
) -> Float[Tensor, "b hq i j"]:
    """The gradient of the products q.k from that of the scores, in place."""
    ds.mul_(cells.score.factor)
    return ds if bend is None else ds.mul_(bend)


def learned_gradients(
    ds: Float[Tensor, "b hq i j"], cells: Cells, wanted: Collection[str]
) -> dict[str, Float[Tensor, "b hq i"]]:
    """What each row of the matrix adds to the gradients of those tensors of the score that scores know."""
    return {
        term.name: term.gradient(ds, cells.place)
        for term in cells.acting
        if term.changes_scores and term.name in wanted
    }


def dropped(x: Float[Tensor, "b hq i j"], cells: Cells) -> Float[Tensor, "b hq i j"]:
    """The weights, or their gradients, times what terms multiply them by; `x` itself where none does."""
    dropping = [term for term in cells.acting if term.drops]
    if not dropping:
        return x
    y = torch.empty_like(x)
    # A generator works in several int64 temporaries: of one head, not of all.
    for n, h in product(*(range(n) for n in x.shape[:2])):
        batch, head = (torch.full((), n, device=x.device) for n in (n, h + cells.place.head))
        by = (term.multiplier(batch, head, cells.place, x.dtype) for term in dropping)
        torch.mul(x[n, h], reduce(torch.mul, by), out=y[n, h])
    return y


def outer(y: Float[Tensor, "b i hq w"], z: Float[Tensor, "b j hkv w"]) -> Float[Tensor, "b hq i j"]:
    """Y z^T for every query head and the kv head that serves it, in float32 or wider."""
    x = _matmul(_grouped(y, z.shape[2]), rearrange(z, "b j g w -> b g w j"))
    return rearrange(x, "b g (r i) j -> b (g r) i j", r=y.shape[2] // z.shape[2])


def times(x: Float[Tensor, "b hq i j"], z: Float[Tensor, "b j hkv w"]) -> Float[Tensor, "b i hq w"]:
    """X z for every query head and the kv head that serves it, in float32 or wider."""
    stacked = rearrange(x, "b (g r) i j -> b g (r i) j", g=z.shape[2])
    y = _matmul(stacked, rearrange(z, "b j g w -> b g j w"))
    return rearrange(y, "b g (r i) w -> b i (g r) w", r=x.shape[1] // z.shape[2])


def transposed_times(
    x: Float[Tensor, "b hq i j"], y: Float[Tensor, "b i hq w"], hkv: int
) -> Float[Tensor, "b j hkv w"]:
    """X^T y, summed over the query heads that a kv head serves, in float32 or wider."""
    stacked = rearrange(x, "b (g r) i j -> b g j (r i)", g=hkv)
    return rearrange(_matmul(stacked, _grouped(y, hkv)), "b g j w -> b j g w")


def _product(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The product of two derivatives, of which `None` is 1."""
    return b if a is None else a if b is None else a.mul_(b)


def _grouped(y: Tensor, hkv: int) -> Float[Tensor, "b g ri w"]:
    return rearrange(y, "b i (g r) w -> b g (r i) w", g=hkv)


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """The product in the type of sums, whatever autocast would make of it."""
    wide = accumulation_dtype(x.dtype)
    with without_autocast(x.device):
        return x.to(wide) @ y.to(wide)
