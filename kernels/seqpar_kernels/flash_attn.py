"""The `flash_attn` implementation: FlashAttention-2 of the package flash-attn, version 2.7 or newer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels import windows
from seqpar_kernels.block import Block, Rows
from seqpar_kernels.partial import Partial
from seqpar_kernels.windows import Window


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block."""
    from flash_attn.flash_attn_interface import _flash_attn_forward

    def op(q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _flash_attn_forward(
            q, k, v, 0.0, scale, **_sides(window),
            softcap=block.score.softcap or 0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, lse

    windows.forward(op, q, k, v, block, into)


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
    from flash_attn.flash_attn_interface import _flash_attn_backward

    def op(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        window: Window,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        _flash_attn_backward(
            dout, q, k, v, out, lse, dq, dk, dv, 0.0, scale, **_sides(window),
            softcap=block.score.softcap or 0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv

    windows.backward(op, of, k, v, block, into)


def _sides(window: Window) -> dict[str, int | bool]:
    """The window as the package takes it: an open side is -1."""
    return {
        "causal": False,
        "window_size_left": -1 if window.left is None else window.left,
        "window_size_right": -1 if window.right is None else window.right,
    }
