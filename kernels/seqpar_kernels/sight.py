"""`Sight`: who sees whom in a block, as ranges, and what reaches whom along them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqpar_kernels.block import Block
from seqpar_kernels.terms import MaskMod


def sight_of(
    block: Block, q: Float[Tensor, "b i hq d"], k: Float[Tensor, "b j hkv d"]
) -> Sight | EachSight:
    """Who sees whom in a block of these rows and columns."""
    num_rows, num_cols = q.shape[1], k.shape[1]
    sight = Sight.of(block, num_rows, num_cols, q.device)
    mods = [term for term in block.acting if isinstance(term, MaskMod)]
    if not mods:
        return sight
    like = q.transpose(1, 2)
    place = block.place(num_rows, num_cols, q.device)
    cols = torch.arange(num_cols, device=q.device)
    shown = (cols >= sight.columns[:, :1]) & (cols < sight.columns[:, 1:])
    return EachSight(reduce(torch.bitwise_and, (term.shows(like, place) for term in mods), shown))


@dataclass(frozen=True)
class EachSight:
    """Who sees whom in a block, score by score: for functions, which know no ranges."""

    shown: Bool[Tensor, "b hq i j"]

    def by_rows(self, bad: Bool[Tensor, "b j h *w"], hq: int) -> Bool[Tensor, "b i hq *w"]:
        """As `Sight.by_rows`."""
        bad = bad.repeat_interleave(hq // bad.shape[2], 2)
        return _reached("bhij,bjhw->bihw", self.shown, bad)

    def by_columns(self, bad: Bool[Tensor, "b i hq *w"], hkv: int) -> Bool[Tensor, "b j hkv *w"]:
        """As `Sight.by_columns`."""
        found = _reached("bhij,bihw->bjhw", self.shown, bad)
        return found.unflatten(2, (hkv, -1)).any(3)


def _reached(equation: str, shown: Tensor, bad: Tensor) -> Tensor:
    wide = bad.unsqueeze(-1) if bad.ndim == 3 else bad
    found = torch.einsum(equation, shown.float(), wide.float()) > 0
    return found.squeeze(-1) if bad.ndim == 3 else found


@dataclass(frozen=True)
class Sight:
    """Who sees whom in a block: a range (first, last + 1) of columns per row, and of rows per column."""

    columns: Int[Tensor, "i 2"]
    rows: Int[Tensor, "j 2"]

    @staticmethod
    def of(block: Block, num_rows: int, num_cols: int, device: torch.device) -> Sight:
        """The ranges that the band and the terms of a block leave."""
        i, j, (lower, upper) = num_rows, num_cols, (block.band.lower, block.band.upper)
        before, behind = (None if x is None else -x for x in (upper, lower))
        return Sight(
            _ranges(lower, upper, i, j, block.row_limits(i, j, device), device),
            _ranges(before, behind, j, i, block.col_limits(i, j, device), device),
        )

    def by_rows(self, bad: Bool[Tensor, "b j h *w"], hq: int) -> Bool[Tensor, "b i hq *w"]:
        """Whether a row of a query head sees anything bad of the columns of its kv head."""
        seen = _any_inside(bad, self.columns)
        return seen.repeat_interleave(hq // bad.shape[2], 2)

    def by_columns(self, bad: Bool[Tensor, "b i hq *w"], hkv: int) -> Bool[Tensor, "b j hkv *w"]:
        """Whether a column of a kv head is seen by any bad row of its query heads."""
        return _any_inside(bad.unflatten(2, (hkv, -1)).any(3), self.rows)


def _ranges(
    lower: int | None,
    upper: int | None,
    length: int,
    num_others: int,
    limits: Int[Tensor, "length 2"] | None,
    device: torch.device,
) -> Int[Tensor, "length 2"]:
    """The range of others that each index sees, which is no narrower than nothing."""
    index = torch.arange(length, device=device)
    first = torch.zeros_like(index) if lower is None else (index + lower).clamp(0, num_others)
    end = (
        torch.full_like(index, num_others)
        if upper is None
        else (index + upper + 1).clamp(0, num_others)
    )
    if limits is not None:
        first, end = torch.maximum(first, limits[:, 0]), torch.minimum(end, limits[:, 1])
    return torch.stack((first, torch.maximum(first, end)), dim=1)


def _any_inside(
    bad: Bool[Tensor, "b n h *w"], ranges: Int[Tensor, "m 2"]
) -> Bool[Tensor, "b m h *w"]:
    """Whether anything bad lies inside each range."""
    before = bad.new_zeros((bad.shape[0], bad.shape[1] + 1, *bad.shape[2:]), dtype=torch.int32)
    torch.cumsum(bad, 1, dtype=torch.int32, out=before[:, 1:])
    first, end = (before.index_select(1, x) for x in ranges.unbind(1))
    return end > first
