"""`Cut`: how one module is cut over ranks, as data; `CutRecord`: what is remembered of it.

`styles` does the cutting, and imports DTensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from seqpar_kernels.torch_internals import forward_hooks

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


@dataclass(frozen=True)
class CutRecord:
    """What is to be remembered of a module that was cut, where its weights do not say it.

    It is a forward hook that changes nothing. So a copy of the module has it too, its state has it not, and
    a user's module gets no attribute.

    Args:
        first_head: of an attention module, the first of its heads here, counted in the whole layer.
        num_dealt: over how many ranks the halves of its rows were dealt; `None`: it has no halves.
    """

    first_head: int = 0
    num_dealt: int | None = None

    def __call__(self, *_: object) -> None:
        """Leaves the output as it is."""

    @staticmethod
    def of(module: nn.Module) -> CutRecord:
        """Finds the record of a module; that of a whole one, where it was not cut."""
        _, hooks = forward_hooks(module)
        records = (hook for hook in hooks.values() if isinstance(hook, CutRecord))
        return next(records, CutRecord())


def deal_halves(x: Tensor, size: int) -> Tensor:
    """Rows (half, rank, i) in the order (rank, half, i), so that each rank's rows are together."""
    return x.unflatten(0, (2, size, -1)).transpose(0, 1).flatten(0, 2)


def undeal_halves(x: Tensor, size: int) -> Tensor:
    """The inverse of `deal_halves`."""
    return x.unflatten(0, (size, 2, -1)).transpose(0, 1).flatten(0, 2)
