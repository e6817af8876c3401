"""The `cudnn` implementation: cuDNN's attention, as torch calls it, where a block is full or a causal square.

Those are all blocks of causal and full attention in the usual layouts. Its op has no window, so a part
of a block that needs one is done by torch's FlashAttention-2. Chosen by name only: never run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar_kernels import aten_cuda
from seqpar_kernels.torch_internals import CUDNN, attention_ops
from seqpar_kernels.windows import Adapter, Arguments, Window

_forward, _backward = attention_ops(CUDNN)


def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float, terms: Arguments
) -> tuple[Tensor, Tensor]:
    causal = _is_causal(q, k, window)
    if causal is None:
        return aten_cuda.ADAPTER.forward_op(q, k, v, window, scale, terms)
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
    window: Window,
    scale: float,
    terms: Arguments,
) -> tuple[Tensor, Tensor, Tensor]:
    causal = _is_causal(q, k, window)
    if causal is None:
        return aten_cuda.ADAPTER.backward_op(dout, q, k, v, out, lse, window, scale, terms)
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


ADAPTER = Adapter("cudnn", _forward_op, _backward_op)
