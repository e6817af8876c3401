"""`Documents`: packed sequences, each position of which sees its own document only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Boundaries 0 = b0 <= b1 <= ... <= bn: document n holds positions b(n) to b(n+1) - 1.

    Two equal boundaries are an empty document. Positions from the last boundary on are one more.

    Raises:
        ValueError: the boundaries do not start at 0 or go down.
        TypeError: they are not integers.
    """

    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(b, int) and not isinstance(b, bool) for b in self.bounds):
            raise TypeError(f"documents must be integer boundaries, got {self.bounds!r}")
        if not self.bounds or self.bounds[0] != 0 or any(a > b for a, b in pairwise(self.bounds)):
            raise ValueError(
                "documents must be boundaries from 0 upwards, the cumulative lengths, "
                f"got {self.bounds!r}"
            )

    def limits(
        self, start: int, length: int, others: int, num_others: int, step: int, device: torch.device
    ) -> Int[Tensor, "length 2"]:
        """Per position, the range of others in the same document, as indices (first, last + 1).

        Positions are start, start + step, ... and the others likewise from `others` on. int32.
        """
        ends = torch.tensor([*self.bounds[1:], torch.iinfo(torch.int64).max >> 1], device=device)
        starts = torch.tensor(self.bounds, device=device)
        positions = start + step * torch.arange(length, device=device)
        document = torch.searchsorted(ends, positions, right=True)
        both = torch.stack((starts[document], ends[document]), dim=1)
        return (-((others - both) // step)).clamp_(0, num_others).int()

    def runs(self, start: int, length: int, step: int) -> Iterator[tuple[int, slice]]:
        """(document, indices) of each document that has some of the positions start, start + step, ..."""
        for n, (first, end) in enumerate(pairwise((*self.bounds, start + length * step))):
            a, b = (min(max(0, -((start - x) // step)), length) for x in (first, end))
            if a < b:
                yield n, slice(a, b)
