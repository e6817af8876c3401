"""The `aten` implementation on CUDA: the FlashAttention-2 that torch brings.

The ops are those under `scaled_dot_product_attention`, called one level lower, where they take a window.
torch's other op that returns lse, cuDNN's, is `seqpar_kernels.cudnn`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels import windows
from seqpar_kernels.block import Block, Rows
from seqpar_kernels.partial import Partial
from seqpar_kernels.windows import Window

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block."""
    windows.forward(forward_op, q, k, v, block, into)


def backward(
    of: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: tuple[Tensor, Tensor, Tensor],
    dslopes: None = None,
) -> None:
    """Adds the block's gradients to dq, dk, dv, given the out and lse of the whole rows.

    The op is deterministic where `torch.use_deterministic_algorithms` asks for it.
    """
    assert dslopes is None, "blocks with ALiBi never come here"
    windows.backward(backward_op, of, k, v, block, into)


def forward_op(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window
) -> tuple[Tensor, Tensor]:
    """(out, lse `[b hq i]`) of one window."""
    out, lse, *_ = _forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False,
        scale=scale, window_size_left=window.left, window_size_right=window.right,
    )  # fmt: skip
    return out, lse


def backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of one window."""
    # The state of a dropout that is off, which is never read.
    seed = torch.empty(0, dtype=torch.uint64, device=q.device)
    return _backward(
        dout, q, k, v, out, lse, None, None, q.shape[1], k.shape[1], 0.0, False, seed, seed,
        scale=scale, window_size_left=window.left, window_size_right=window.right,
    )  # fmt: skip
