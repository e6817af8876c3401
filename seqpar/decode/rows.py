"""The rows of k and v that a rank holds: of the prefill as they are, and of the positions since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqpar.layout import Span, part

Spans = tuple[Span, ...]


@dataclass
class Held:
    """Some rows of k and v, and their positions in the order in which they are held."""

    k: Float[Tensor, "b j hkv d"]
    v: Float[Tensor, "b j hkv vd"]
    spans: Spans

    def reorder(self, indices: Int[Tensor, "n"]) -> None:
        """Replaces the batch by some of its entries. Copies."""
        self.k, self.v = (x.index_select(0, indices) for x in (self.k, self.v))


class Grown:
    """Rows in memory that doubles when it is full: n appended rows are fewer than 2n copies more.

    At most half of the memory is spare, unless rows are forgotten.
    """

    def __init__(self, like: Held) -> None:
        self._memory = like.k[:, :0], like.v[:, :0]
        self.spans: Spans = ()
        self.num_rows = 0

    @property
    def held(self) -> Held:
        """The rows, as views of the memory."""
        k, v = (x[:, : self.num_rows] for x in self._memory)
        return Held(k, v, self.spans)

    def append(self, k: Tensor, v: Tensor, positions: Sequence[int]) -> None:
        """Copies the rows of some positions, greater than all before, behind those held."""
        start, stop = self.num_rows, self.num_rows + len(positions)
        memory = self._memory[0]
        # What was made in inference mode cannot be written to outside of it.
        is_locked = memory.is_inference() and not torch.is_inference_mode_enabled()
        if stop > memory.shape[1] or is_locked:
            self._grow(2 * stop)
        for memory, x in zip(self._memory, (k, v), strict=True):
            memory[:, start:stop].copy_(x)
        self.num_rows = stop
        for position in positions:
            self.spans = extended(self.spans, position)

    def truncate(self, num_rows: int) -> None:
        """Forgets all but the first rows."""
        self.num_rows = num_rows
        self.spans = part(self.spans, slice(0, num_rows))

    def reorder(self, indices: Int[Tensor, "n"]) -> None:
        """Replaces the batch by some of its entries. Copies."""
        self._memory = tuple(x.index_select(0, indices) for x in self._memory)  # type: ignore[assignment]

    def _grow(self, capacity: int) -> None:
        larger = tuple(x.new_empty(x.shape[0], capacity, *x.shape[2:]) for x in self._memory)
        for new, old in zip(larger, self._memory, strict=True):
            new[:, : self.num_rows].copy_(old[:, : self.num_rows])
        self._memory = larger  # type: ignore[assignment]


def extended(spans: Spans, position: int) -> Spans:
    """Adds a position, greater than all, to spans, in as few spans as progressions allow."""
    if not spans:
        return (Span(position, 1),)
    *before, last = spans
    # One position alone begins a progression of any step, whatever its own step says.
    step = position - last.start if last.length == 1 else last.step
    if last.start + last.length * step != position:
        return (*spans, Span(position, 1))
    return (*before, Span(last.start, last.length + 1, step))


def deal(rows: Sequence[int], num_new: int) -> list[int]:
    """Deals the next positions: each to the rank with the fewest rows, the lowest of those."""
    counts, owners = list(rows), []
    for _ in range(num_new):
        owner = min(range(len(counts)), key=counts.__getitem__)
        counts[owner] += 1
        owners.append(owner)
    return owners
