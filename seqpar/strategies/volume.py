"""`Volume`: what a strategy's formula says a rank sends, to be compared with what was counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.comm import Count
from seqpar_kernels import Implementation, accumulation_dtype


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention call that do not depend on the rank."""

    batch: int
    hq: int
    hkv: int
    d: int
    vd: int
    dtype: torch.dtype
    slopes_learn: bool = False
    sinks_learn: bool = False
    with_lse: bool = False

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, **what: bool) -> Shape:
        """The sizes of `q [b sl hq d]`, `k [b sl hkv d]`, `v [b sl hkv vd]`, and what is wanted of it."""
        sizes = q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
        return Shape(*sizes, q.dtype, **what)

    @property
    def num_learned(self) -> int:
        """How many of slopes and sinks get gradients."""
        return self.slopes_learn + self.sinks_learn

    @property
    def kv(self) -> int:
        """Elements of k and v together in one position."""
        return self.hkv * (self.d + self.vd)

    def count(self, elements: int, *, wide: bool = False) -> Count:
        """Elements per batch entry, in the type of the tensors or in the wider type of sums."""
        dtype = accumulation_dtype(self.dtype) if wide else self.dtype
        return Count(self.batch * elements, self.batch * elements * dtype.itemsize)


@dataclass(frozen=True)
class Volume:
    """What one rank sends."""

    forward: Count = Count()
    backward: Count = Count()


def needs_out(implementation: Implementation | None) -> bool:
    """Whether its backward derives delta from `out`, so that rows that travel take `out` along."""
    return implementation not in ("reference", "triton")
