"""The attention problems that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from seqpar.layout import Mask

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout, or out, dq, dk, dv: [b s h d]


@dataclass(frozen=True)
class Setting:
    """An attention problem of one sequence.

    Args:
        window: keys a row sees, itself included.
        documents: of equal lengths, packed.
    """

    tokens: int
    heads: int
    kv_heads: int
    d: int
    causal: bool
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    documents: int = 1

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        mask = "causal" if self.causal else "full"
        mask += f", window {self.window}" if self.window else ""
        mask += f", {self.documents} documents" if self.documents > 1 else ""
        dtype = (
            "" if self.dtype == torch.bfloat16 else f", {str(self.dtype).removeprefix('torch.')}"
        )
        return f"{self.tokens} tokens, {heads} heads of {self.d}, {mask}{dtype}"

    @property
    def mask(self) -> Mask:
        """What rows see."""
        length = self.tokens // self.documents
        bounds = (*range(0, length * self.documents, length), self.tokens)
        return Mask(self.causal, self.window, bounds if self.documents > 1 else None)

    @property
    def forward_flops(self) -> float:
        """Two products of 2 i j d operations for each head; half of them where causal."""
        length = self.tokens / self.documents
        pairs = length**2 / (2 if self.causal else 1)
        if self.window is not None and self.window < length:
            hidden = (length - self.window) ** 2
            pairs -= hidden / 2 if self.causal else hidden
        return 4 * self.heads * self.documents * pairs * self.d

    @property
    def backward_flops(self) -> float:
        """Five products, where the forward has two."""
        return 2.5 * self.forward_flops

    def tensors(self, device: torch.device) -> Tensors:
        """q, k, v and dout: normal numbers."""
        make = partial(torch.randn, device=device, dtype=self.dtype)
        of_q = 1, self.tokens, self.heads, self.d
        of_kv = 1, self.tokens, self.kv_heads, self.d
        return make(of_q), make(of_kv), make(of_kv), make(of_q)


SETTINGS = [
    Setting(16384, 32, 32, 64, causal=True),
    Setting(16384, 16, 16, 128, causal=True),
    Setting(16384, 16, 16, 128, causal=False),
    Setting(16384, 32, 8, 128, causal=True),
    Setting(8192, 8, 8, 256, causal=True),
    Setting(8192, 4, 1, 128, causal=True),  # what Ulysses leaves of 32/8 heads on each of 8 ranks
    Setting(4096, 32, 8, 128, causal=True),
    Setting(2048, 32, 8, 128, causal=True),
    Setting(4096, 16, 16, 64, causal=True, dtype=torch.float32),
    Setting(16384, 32, 8, 128, causal=True, window=1024),
    Setting(16384, 32, 8, 128, causal=True, documents=8),
    Setting(16384, 32, 8, 128, causal=True, documents=64),
]
QUICK = SETTINGS[:2]
RING = Setting(0, 16, 16, 128, causal=True)
TUNED = [
    Setting(8192, 32, 32, 64, causal=True),
    Setting(8192, 16, 16, 128, causal=True),
    Setting(8192, 8, 8, 256, causal=True),
]
