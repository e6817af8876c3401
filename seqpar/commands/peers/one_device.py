"""torch's attention on one device, in the shape that everybody here has: `[b s h d]`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from seqpar_kernels.torch_internals import CPU_FLASH, attention_ops

# q, k, v [b sl h d] -> out [b sl h d], differentiable
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_forward, _backward = attention_ops(CPU_FLASH)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None) -> Tensor:
    """softmax(q k^T) v by scaled_dot_product_attention, differentiable."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).transpose(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out `[b h s d]`, lse `[b h s]`) of q, k, v `[b h s d]`, by torch's op for the CPU."""
    out, lse = _forward(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), all `[b h s d]`, of what `forward` gave or of a part of more keys."""
    dq, dk, dv = _backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    return dq, dk, dv
