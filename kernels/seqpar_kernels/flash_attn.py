"""The `flash_attn` implementation: FlashAttention-2 of the package flash-attn, version 2.7 or newer."""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar_kernels.windows import Adapter, Arguments, Window

# What the package asks to be told of terms that are not there.
_OFF: Arguments = {"softcap": 0.0, "alibi_slopes": None}


def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float, terms: Arguments
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    out, lse, *_ = _flash_attn_forward(
        q, k, v, 0.0, scale, **_sides(window),
        return_softmax=False, **_OFF | terms,
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
    from flash_attn.flash_attn_interface import _flash_attn_backward

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn_backward(
        dout, q, k, v, out, lse, dq, dk, dv, 0.0, scale, **_sides(window),
        **_OFF | terms,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _sides(window: Window) -> dict[str, int | bool]:
    """The window as the package takes it: an open side is -1."""
    return {
        "causal": False,
        "window_size_left": -1 if window.left is None else window.left,
        "window_size_right": -1 if window.right is None else window.right,
    }


ADAPTER = Adapter("flash_attn", _forward_op, _backward_op)
