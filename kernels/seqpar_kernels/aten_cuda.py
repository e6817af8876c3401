"""The `aten` implementation on CUDA: the FlashAttention-2 that torch brings.

The ops are those under `scaled_dot_product_attention`, called one level lower, where they take a window.
They are deterministic where `torch.use_deterministic_algorithms` asks for it. torch's other op that
returns lse, cuDNN's, is `seqpar_kernels.cudnn`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar_kernels.torch_internals import CUDA_FLASH, attention_ops
from seqpar_kernels.windows import Adapter, Arguments, Window

_forward, _backward = attention_ops(CUDA_FLASH)


def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float, terms: Arguments
) -> tuple[Tensor, Tensor]:
    assert not terms, "blocks with terms that change scores never come here"
    out, lse, *_ = _forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False,
        scale=scale, window_size_left=window.left, window_size_right=window.right,
    )  # fmt: skip
    return out, lse


def _backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: Window,
    scale: float,
    terms: Arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    assert not terms, "blocks with terms that change scores never come here"
    # The state of a dropout that is off, which is never read.
    seed = torch.empty(0, dtype=torch.uint64, device=q.device)
    return _backward(
        dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, False, seed, seed,
        scale=scale, window_size_left=window.left, window_size_right=window.right,
    )  # fmt: skip


ADAPTER = Adapter("aten", _forward_op, _backward_op)
