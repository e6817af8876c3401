"""`Blocks`: tokens that see each other in a mask, whatever else it shows, as those of an image in text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from torch import Tensor

from seqpar.integrations.transformers.attention.forms import (
    A_FUNCTION,
    A_NUMBER,
    A_TENSOR,
    filled,
)
from seqpar.integrations.transformers.internals import block_forms
from seqpar.layout import Mask
from seqpar.layout.dense import runs_of
from seqpar.masks import band, rectangle

Run = tuple[int, int]
Block = tuple[Run, ...]  # its tokens, mostly in one run (start, stop)


@dataclass(frozen=True)
class Blocks:
    """Which tokens see each other, in each row of a batch.

    Args:
        rows: the blocks of each row.
        window: how many keys back a token sees in its block, itself included.
    """

    rows: tuple[tuple[Block, ...], ...]
    window: int | None = None

    @staticmethod
    def of(ids: Tensor, window: int | None = None) -> Blocks | None:
        """Reads them from the block of each token `[b s]`, -1 where it has none; `None` if no token has."""
        rows = []
        for row in ids.cpu():
            numbers = [n for n in row.unique().tolist() if n >= 0]
            rows.append(tuple(tuple(runs_of((row == n)[None])[0]) for n in numbers))
        return Blocks(tuple(rows), window) if any(rows) else None

    def masks(self) -> list[Mask | None]:
        """What the tokens of each row see by them; `None`: it has no block."""
        return [self._mask(row) for row in self.rows]

    def _mask(self, row: tuple[Block, ...]) -> Mask | None:
        parts = [rectangle(x, y) for block in row for x in block for y in block]
        if not parts:
            return None
        seen = reduce(or_, parts)
        return seen if self.window is None else seen & band(1 - self.window)


def without_blocks(
    mask_function: Callable[..., Any],
) -> tuple[Callable[..., Any], Blocks | None, int | None]:
    """Takes a mask function apart: what there is beside blocks, the blocks, and a window that both are in."""
    forms = block_forms(A_FUNCTION, A_TENSOR, A_NUMBER)
    if forms is not None:
        beside, windowed = forms
        if found := filled(mask_function, beside):
            function, ids = found
            return function, Blocks.of(ids), None
        if found := filled(mask_function, windowed):
            function, ids, window = found
            return function, Blocks.of(ids, window), window
    return mask_function, None, None
