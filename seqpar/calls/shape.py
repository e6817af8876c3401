"""`Shape`, the sizes of a call, and `Volume`, what a rank sends in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.comm import Count


@dataclass(frozen=True)
class Shape:
    """The sizes of an attention call that do not depend on the rank.

    Args:
        learns: the tensors of the score that get gradients, by name.
        with_lse: whether lse is wanted too, and differentiated.
    """

    batch: int
    hq: int
    hkv: int
    d: int
    vd: int
    dtype: torch.dtype
    learns: tuple[str, ...] = ()
    with_lse: bool = False

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, *, learns: tuple[str, ...] = (), with_lse: bool = False
    ) -> Shape:
        """The sizes of `q [b sl hq d]`, `k [b sl hkv d]`, `v [b sl hkv vd]`, and what is wanted of it."""
        sizes = q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
        return Shape(*sizes, q.dtype, learns, with_lse)


@dataclass(frozen=True)
class Volume:
    """The elements and bytes that one rank sends."""

    forward: Count = Count()
    backward: Count = Count()
