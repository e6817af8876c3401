"""The `cudnn` implementation: cuDNN's attention, as torch calls it, where a block is full or a causal square.

Those are all blocks of causal and full attention in the usual layouts. Its op has no window, so a part
of a block that needs one is done by torch's FlashAttention-2. Chosen by name only: never run on a GPU yet.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels import aten_cuda, windows
from seqpar_kernels.block import Block, Rows
from seqpar_kernels.partial import Partial
from seqpar_kernels.windows import Window

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block."""
    windows.forward(_op, q, k, v, block, into)


def backward(
    of: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: tuple[Tensor, Tensor, Tensor],
    dslopes: None = None,
) -> None:
    """Adds the block's gradients to dq, dk, dv, given the out and lse of the whole rows."""
    assert dslopes is None, "blocks with ALiBi never come here"
    windows.backward(_backward_op, of, k, v, block, into)


def _op(q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window) -> tuple[Tensor, Tensor]:
    causal = _is_causal(q, k, window)
    if causal is None:
        return aten_cuda.forward_op(q, k, v, scale, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = _forward(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def _backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: Window,
) -> tuple[Tensor, Tensor, Tensor]:
    causal = _is_causal(q, k, window)
    if causal is None:
        return aten_cuda.backward_op(dout, q, k, v, out, lse, scale, window)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that is off
    dq, dk, dv = _backward(
        dout, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None,
        q.shape[2], k.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _is_causal(q: Tensor, k: Tensor, window: Window) -> bool | None:
    """Whether the op has to mask, or `None` where it cannot.

    Only squares: where a causal mask of another shape hangs is not documented.
    """
    if window.left is None and window.right is None:
        return False
    square = q.shape[1] == k.shape[1] and window.left is None and window.right == 0
    return True if square else None
