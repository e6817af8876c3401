"""`Case`: one attention problem, small enough to send to a worker and to print when it fails."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.layout import LAYOUTS, Layout, Mask
from seqpar.testing import oracle
from seqpar.testing.budget import Budget

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """Sizes, mask and type of a problem; its tensors are random, but always the same."""

    length: int
    hq: int = 4
    hkv: int = 4
    d: int = 16
    vd: int = 16
    batch: int = 1
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    kind: str = "contiguous"

    @property
    def mask(self) -> Mask:
        """The mask, as the package takes it."""
        return Mask(causal=self.causal, window=self.window)

    def layout(self, size: int) -> Layout:
        """The layout for a number of ranks."""
        return LAYOUTS[self.kind](self.length, size)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout, whole, `[b s h d]`: normal numbers rounded to `dtype`."""
        generator = torch.Generator().manual_seed(0)
        shapes = (self.hq, self.d), (self.hkv, self.d), (self.hkv, self.vd), (self.hq, self.vd)
        q, k, v, dout = (
            torch.randn(self.batch, self.length, *s, dtype=torch.float64, generator=generator)
            for s in shapes
        )
        return tuple(x.to(self.dtype) for x in (q, k, v, dout))  # type: ignore[return-value]

    def budget(self) -> Budget:
        """What the results must be, and how far from it they may be."""
        seen = oracle.visible(self.length, self.causal, self.window)
        scale = 1 / math.sqrt(self.d) if self.scale is None else self.scale
        return Budget.of(*self.tensors(), seen, scale)
