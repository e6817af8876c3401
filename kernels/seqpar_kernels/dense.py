"""Scores that are stored: what is done to them where given rows and columns meet, and products with them.

Rows and columns are any global positions in any order, named one by one, where a `Block` is cut from
progressions. Matrices are `[b hq i j]`, in float32 or wider. The softmax over them is `row_softmax`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import product

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqpar_kernels.block import Block
from seqpar_kernels.finite import may_hold_poison, taken_out
from seqpar_kernels.layer import Layer
from seqpar_kernels.partial import accumulation_dtype, without_autocast
from seqpar_kernels.score import Score
from seqpar_kernels.sight import EachSight, Sight, sight_of
from seqpar_kernels.terms import MaskMod, Place, Term


@dataclass(frozen=True)
class Seen:
    """What the rows of some batch entries see: what all of these functions show of these layers."""

    layers: tuple[Layer, ...]
    mods: tuple[MaskMod, ...] = ()

    def visible(self, like: Float[Tensor, "b hq *w"], place: Place) -> Bool[Tensor, "*b i j"]:
        """True where a row sees a column, by batch entry and head where functions may tell them apart.

        Args:
            like: of the batch entries and heads at hand.
        """
        shown = (layer.visible(place) for layer in self.layers)
        nothing = torch.zeros(
            len(place.row), len(place.col), dtype=torch.bool, device=place.row.device
        )
        visible = reduce(Tensor.bitwise_or_, shown, nothing)
        return reduce(torch.bitwise_and, (mod.shows(like, place) for mod in self.mods), visible)


@dataclass(frozen=True, eq=False)
class Cells:
    """Part of a score matrix: its rows and columns by position, and what is done to the scores.

    Args:
        place: of the rows, columns and query heads at hand, on the device of the scores.
        seen: what rows see, in which batch entries.
        score: of all query heads, with the scale resolved.
        lengths: how many positions rows and columns have in all.
        terms: what is done besides the score.
    """

    place: Place
    seen: tuple[tuple[slice, Seen], ...]
    score: Score
    lengths: tuple[int, int]
    terms: tuple[Term, ...] = ()

    @cached_property
    def acting(self) -> tuple[Term, ...]:
        """All terms that do something, in the order in which they are applied."""
        return tuple(term for term in (*self.score.terms, *self.terms) if term.acts)

    def visible(self, like: Float[Tensor, "b hq *w"]) -> Bool[Tensor, "*b i j"]:
        """True where a row sees a column; `[b _ i j]` where batch entries or heads may differ.

        Args:
            like: of the batch entries and heads at hand.
        """
        if len(self.seen) == 1:
            return self.seen[0][1].visible(like, self.place)
        parts = []
        for batch, seen in self.seen:
            here = seen.visible(like[batch], replace(self.place, batch=batch.start))
            parts.append(here.expand(batch.stop - batch.start, like.shape[1], -1, -1))
        return torch.cat(parts)

    def columns(self, cols: slice) -> Cells:
        """The cells of some of the columns."""
        return replace(self, place=replace(self.place, col=self.place.col[cols]))

    def reached_rows(self, bad: Bool[Tensor, "b j hkv w"], hq: int) -> Bool[Tensor, "b i hq w"]:
        """Whether a row sees anything bad of the columns."""
        row, bad = self.place.row, _placed(bad, self.place.col, self.lengths[1])
        reached = bad.new_zeros(bad.shape[0], len(row), hq, bad.shape[3])
        for batch, sight in self._sights(bad, hq):
            reached[batch] |= sight.by_rows(bad[batch], hq).index_select(1, row)
        return reached

    def reached_columns(self, bad: Bool[Tensor, "b i hq w"], hkv: int) -> Bool[Tensor, "b j hkv w"]:
        """Whether a column is seen by any bad row."""
        col, bad = self.place.col, _placed(bad, self.place.row, self.lengths[0])
        reached = bad.new_zeros(bad.shape[0], len(col), hkv, bad.shape[3])
        for batch, sight in self._sights(bad, bad.shape[2]):
            reached[batch] |= sight.by_columns(bad[batch], hkv).index_select(1, col)
        return reached

    def _sights(self, like: Tensor, hq: int) -> Iterator[tuple[slice, Sight | EachSight]]:
        """Yields (batch entries, who sees whom by position) of each layer."""
        rows, cols = self.lengths
        for batch, seen in self.seen:
            num = len(like[batch])
            q, k = like.new_empty(num, rows, hq, 1), like.new_empty(num, cols, 1, 1)
            for layer in seen.layers:
                terms = (*layer.terms, *seen.mods)
                place = 0, 0, 1, self.place.head, batch.start or 0
                yield batch, sight_of(Block(layer.band(0, 0, 1), self.score, *place, terms), q, k)


def scores_(
    x: Float[Tensor, "b hq i j"], cells: Cells
) -> tuple[Tensor, Float[Tensor, "b hq i j"] | None, Float[Tensor, "b hq i j"] | None]:
    """Turns products q.k into scores, in place; hidden ones become -inf.

    Returns:
        The scores; where terms bend them their derivative by scale * q.k; and what a `score_mod` that learns
        was given.
    """
    bend = before = None
    x.mul_(cells.score.factor)
    for term in cells.acting:
        if term.changes_scores:
            if term.asks_each and cells.score.captured:
                before = x.clone()
            slope = term.scores_(x, cells.place)
            bend = _product(bend, slope)
    hidden = ~cells.visible(x)
    if bend is not None:
        bend.masked_fill_(hidden, 0.0)  # whatever hidden scores are
    return x.masked_fill_(hidden, -torch.inf), bend, before


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
        if term.changes_scores and not term.has_sums and term.name in wanted
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


def outer(
    y: Float[Tensor, "b i hq w"], z: Float[Tensor, "b j hkv w"], cells: Cells
) -> Float[Tensor, "b hq i j"]:
    """Y z^T for every query head and the kv head that serves it, in float32 or wider.

    A hidden product is finite unless it overflows.
    """
    if may_hold_poison(y, z):
        (y, in_y), (z, in_z) = taken_out(y), taken_out(z)
        rows, cols = (x.any(-1).transpose(1, 2) for x in (in_y, in_z))
        cols = cols.repeat_interleave(y.shape[2] // z.shape[2], 1)
        bad = (rows.unsqueeze(3) | cols.unsqueeze(2)) & cells.visible(y.transpose(1, 2))
        return _outer(y, z).masked_fill_(bad, torch.nan)
    return _outer(y, z)


def times(
    x: Float[Tensor, "b hq i j"], z: Float[Tensor, "b j hkv w"], cells: Cells
) -> Float[Tensor, "b i hq w"]:
    """X z for every query head and the kv head that serves it, in float32 or wider. Hidden cells are 0."""
    if may_hold_poison(z):
        z, bad = taken_out(z)
        return _times(x, z).masked_fill_(cells.reached_rows(bad, x.shape[1]), torch.nan)
    return _times(x, z)


def transposed_times(
    x: Float[Tensor, "b hq i j"], y: Float[Tensor, "b i hq w"], hkv: int, cells: Cells
) -> Float[Tensor, "b j hkv w"]:
    """X^T y, summed over the query heads that a kv head serves, in float32 or wider. Hidden cells are 0."""
    if may_hold_poison(y):
        y, bad = taken_out(y)
        return _transposed_times(x, y, hkv).masked_fill_(cells.reached_columns(bad, hkv), torch.nan)
    return _transposed_times(x, y, hkv)


def _outer(y: Tensor, z: Tensor) -> Tensor:
    x = _matmul(_grouped(y, z.shape[2]), rearrange(z, "b j g w -> b g w j"))
    return rearrange(x, "b g (r i) j -> b (g r) i j", r=y.shape[2] // z.shape[2])


def _times(x: Tensor, z: Tensor) -> Tensor:
    stacked = rearrange(x, "b (g r) i j -> b g (r i) j", g=z.shape[2])
    y = _matmul(stacked, rearrange(z, "b j g w -> b g j w"))
    return rearrange(y, "b g (r i) w -> b i (g r) w", r=x.shape[1] // z.shape[2])


def _transposed_times(x: Tensor, y: Tensor, hkv: int) -> Tensor:
    stacked = rearrange(x, "b (g r) i j -> b g j (r i)", g=hkv)
    return rearrange(_matmul(stacked, _grouped(y, hkv)), "b g j w -> b j g w")


def _placed(
    bad: Bool[Tensor, "b n h w"], where: Int[Tensor, "n"], length: int
) -> Bool[Tensor, "b s h w"]:
    """What is bad, at its positions."""
    whole = bad.new_zeros(bad.shape[0], length, *bad.shape[2:])
    return whole.index_copy_(1, where, bad)


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
