"""The ops of attention on CUDA that take windows: torch's FlashAttention-2, the package flash-attn, cuDNN.

All take one record, `Call`. torch's are those under `scaled_dot_product_attention`, one level lower, where
they return lse. The tests have fakes of them, `tests/gpu` the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar_kernels.torch_internals import CUDA_FLASH, CUDNN, attention_ops
from seqpar_kernels.windows import Window


@dataclass(frozen=True)
class Call:
    """Attention of some rows under one window.

    Args:
        q, k, v: `[b i hq w]`, `[b j hkv w]`, `[b j hkv w]`, as `_as_the_op_wants`.
        scale: positive.
        terms: of the score, by the name of the op's argument.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    window: Window
    scale: float
    terms: dict[str, Any]

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """What every op takes first."""
        return self.q, self.k, self.v


@dataclass(frozen=True)
class Attended:
    """What backward is given besides: `[b i hq w]` in the type of q, and lse `[b hq i]` of the whole rows."""

    dout: Tensor
    out: Tensor
    lse: Tensor


ForwardOp = Callable[[Call], tuple[Tensor, Tensor]]  # (out, lse) as in `Attended`
BackwardOp = Callable[
    [Call, Attended], tuple[Tensor, Tensor, Tensor]
]  # (dq, dk, dv), in the type of q


# torch's FlashAttention-2: deterministic where `torch.use_deterministic_algorithms` asks for it.

_forward, _backward = attention_ops(CUDA_FLASH)


def aten_forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse), as all forward ops here."""
    causal, options = _aten_options(call)
    out, lse, *_ = _forward(*call.qkv, None, None, *lengths(call), 0.0, causal, False, **options)
    return out, lse


def aten_backward(call: Call, rows: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), as all backward ops here."""
    # The state of a dropout that is off, which is never read.
    seed = torch.empty(0, dtype=torch.uint64, device=call.q.device)
    causal, options = _aten_options(call)
    return _backward(
        rows.dout, *call.qkv, rows.out, rows.lse, None, None, *lengths(call), 0.0, causal, seed, seed,
        **options,
    )  # fmt: skip


def lengths(call: Call) -> tuple[int, int]:
    """The numbers of rows and columns."""
    return call.q.shape[1], call.k.shape[1]


def _aten_options(call: Call) -> tuple[bool, dict[str, Any]]:
    """(is_causal, what is given by name). FlashAttention-4 under this op has no backward with a window."""
    assert not call.terms, "blocks with terms that change scores never come here"
    left, right = call.window.left, call.window.right
    if left is None and right == 0:
        return True, {"scale": call.scale, "window_size_left": None, "window_size_right": None}
    return False, {"scale": call.scale, "window_size_left": left, "window_size_right": right}


# The package flash-attn, version 2.7 or newer, whose functions are the ones under its own autograd.


def package_forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) by the package."""
    from flash_attn.flash_attn_interface import _flash_attn_forward

    options = _package_options(call)
    out, lse, *_ = _flash_attn_forward(*call.qkv, 0.0, call.scale, return_softmax=False, **options)
    return out, lse


def package_backward(call: Call, rows: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by the package."""
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in call.qkv)
    _flash_attn_backward(
        rows.dout, *call.qkv, rows.out, rows.lse, dq, dk, dv, 0.0, call.scale,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_package_options(call),
    )  # fmt: skip
    return dq, dk, dv


def _package_options(call: Call) -> dict[str, Any]:
    """What the package asks to be told: an open side is -1, and terms that are not there are off."""
    left, right = (-1 if side is None else side for side in (call.window.left, call.window.right))
    off = {"softcap": 0.0, "alibi_slopes": None}
    return {
        "causal": False, "window_size_left": left, "window_size_right": right, **off, **call.terms
    }  # fmt: skip


# cuDNN, where a block is full or a causal square: all blocks of causal and full attention in the usual
# layouts. Its op has no window, so what needs one is done by torch's FlashAttention-2.

_cudnn, _cudnn_back = attention_ops(CUDNN)


def cudnn_forward(call: Call) -> tuple[Tensor, Tensor]:
    """(out, lse) by cuDNN, or by FlashAttention-2."""
    causal = _is_causal(call)
    if causal is None:
        return aten_forward(call)
    q, k, v = (x.transpose(1, 2) for x in call.qkv)
    out, lse, *_ = _cudnn(q, k, v, None, True, 0.0, causal, False, scale=call.scale)
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def cudnn_backward(call: Call, rows: Attended) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) by cuDNN, or by FlashAttention-2."""
    causal = _is_causal(call)
    if causal is None:
        return aten_backward(call, rows)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (rows.dout, *call.qkv, rows.out))
    seed = torch.empty(
        (), dtype=torch.int64, device=q.device
    )  # of a dropout that is off: never read
    dq, dk, dv = _cudnn_back(
        dout, q, k, v, out, rows.lse.unsqueeze(-1), seed, seed, None, None, None, *lengths(call), 0.0,
        causal, scale=call.scale,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _is_causal(call: Call) -> bool | None:
    """Whether the op has to mask, or `None` where it cannot.

    Only squares: where a causal mask of another shape hangs is not documented. A single key it refuses.
    """
    (num_rows, num_cols), window = lengths(call), call.window
    if num_cols == 1:
        return None
    if window.left is None and window.right is None:
        return False
    square = num_rows == num_cols and window.left is None and window.right == 0
    return True if square else None
