"""Scores that are stored: what is done to them where given rows and columns meet, and products with them.

Rows and columns are any global positions in any order, named one by one, where a `Block` is cut from
progressions. Matrices are `[b hq i j]`, in float32 or wider. The softmax over them is `row_softmax`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.documents import Documents
from seqpar_kernels.dropout import Dropout
from seqpar_kernels.partial import accumulation_dtype, without_autocast
from seqpar_kernels.score import Score


@dataclass(frozen=True, eq=False)
class Cells:
    """Part of a score matrix: its rows and columns by position, and what is done to the scores.

    Args:
        row, col: global positions, int64, on the device of the scores.
        band: row i sees column j iff band.lower <= col[j] - row[i] <= band.upper.
        score: of all query heads, with the scale resolved.
        dropout: of the weights, or `None`.
        documents: of the whole sequence, or `None` if it is one.
        head: which of all query heads is the first at hand.
    """

    row: Int[Tensor, "i"]
    col: Int[Tensor, "j"]
    band: Band
    score: Score
    dropout: Dropout | None = None
    documents: Documents | None = None
    head: int = 0

    def visible(self) -> Bool[Tensor, "i j"]:
        """True where a row sees a column."""
        ahead = self.col - self.row[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if self.band.lower is not None:
            seen &= ahead >= self.band.lower
        if self.band.upper is not None:
            seen &= ahead <= self.band.upper
        if self.documents is not None:
            borders = torch.tensor(self.documents.bounds[1:], device=self.row.device)
            row, col = (torch.searchsorted(borders, x, right=True) for x in (self.row, self.col))
            seen &= row[:, None] == col
        return seen

    def distance(self, dtype: torch.dtype) -> Float[Tensor, "i j"]:
        """How many positions lie between each row and each column."""
        return (self.row[:, None] - self.col).abs().to(dtype)


def scores_(
    x: Float[Tensor, "b hq i j"], cells: Cells
) -> tuple[Float[Tensor, "b hq i j"], Float[Tensor, "b hq i j"] | None]:
    """Turns products q.k into scores, in place; hidden ones become -inf.

    Returns:
        The scores, and with a softcap their derivative by scale * q.k.
    """
    score, bend = cells.score, None
    x.mul_(score.factor)
    if score.softcap is not None:
        x.div_(score.softcap).tanh_()
        bend = x.square().neg_().add_(1.0)
        x.mul_(score.softcap)
    if score.alibi_slopes is not None:
        slopes = score.alibi_slopes.to(x.dtype)[:, None, None]
        x.addcmul_(slopes, cells.distance(x.dtype), value=-1)
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
    if "alibi_slopes" not in wanted:
        return {}
    return {"alibi_slopes": -(ds * cells.distance(ds.dtype)).sum(-1)}


def dropped(x: Float[Tensor, "b hq i j"], cells: Cells) -> Float[Tensor, "b hq i j"]:
    """The weights, or their gradients, times what dropout multiplies them by; `x` itself without dropout."""
    if cells.dropout is None:
        return x
    y = torch.empty_like(x)
    # The generator works in several int64 temporaries: of one head, not of all.
    for place in product(*(range(n) for n in x.shape[:2])):
        batch, head = (torch.full((), n, device=x.device) for n in place)
        keeps = cells.dropout.keeps(batch, head + cells.head, cells.row[:, None], cells.col)
        torch.mul(x[place], keeps, out=y[place])
    return y.mul_(cells.dropout.factor)


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


def _grouped(y: Tensor, hkv: int) -> Float[Tensor, "b g ri w"]:
    return rearrange(y, "b i (g r) w -> b g (r i) w", g=hkv)


def _matmul(x: Tensor, y: Tensor) -> Tensor:
    """The product in the type of sums, whatever autocast would make of it."""
    wide = accumulation_dtype(x.dtype)
    with without_autocast(x.device):
        return x.to(wide) @ y.to(wide)
