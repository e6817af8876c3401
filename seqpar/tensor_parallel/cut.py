"""`Cut`: how one module is cut over ranks, as data. `styles` does it, and imports DTensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

Form: TypeAlias = Literal["whole", "sharded"]
ModuleKind: TypeAlias = Literal["linear", "transposed linear", "embedding", "norm"]


@dataclass(frozen=True)
class Cut:
    """How one module is cut.

    Args:
        kind: of module; a transposed linear has the weight `[in, out]`.
        dim: of the weight that is cut; None leaves it whole.
        reads, writes: the form of input and output between modules: whole on every rank, or sharded along
            the last dimension.
        halves: whether the rows are two halves, of both of which each rank takes its part.
        per_head: for a norm: its input has heads in dimension -2, which are sharded.
    """

    kind: ModuleKind
    dim: int | None
    reads: Form = "whole"
    writes: Form = "whole"
    halves: bool = False
    per_head: bool = False


def deal_halves(x: Tensor, size: int) -> Tensor:
    """Rows (half, rank, i) in the order (rank, half, i), so that each rank's rows are together."""
    return x.unflatten(0, (2, size, -1)).transpose(0, 1).flatten(0, 2)


def undeal_halves(x: Tensor, size: int) -> Tensor:
    """The inverse of `deal_halves`."""
    return x.unflatten(0, (size, 2, -1)).transpose(0, 1).flatten(0, 2)
