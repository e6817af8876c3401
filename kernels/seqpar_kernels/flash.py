"""FlashAttention-2 on CUDA: torch's own, the package flash-attn's, and cuDNN's where torch calls it.

They take the same record of arguments, and a window where a block has a band. Each rounds what it returns to
the type of q: the out of every block, and every block's share of the gradients. torch's ops are those under
`scaled_dot_product_attention`, one level lower, where they return lse. Never run on a GPU yet: the tests
have fakes of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.aten import positive
from seqpar_kernels.block import Block
from seqpar_kernels.choice import fuses
from seqpar_kernels.partial import Partial
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.terms import ScoreTerm
from seqpar_kernels.torch_internals import CUDA_FLASH, CUDNN, attention_ops
from seqpar_kernels.windows import Window, windows

ALIGNED = 8  # elements: the ops load 16 bytes at a time, and their widths are multiples of this


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


@dataclass(frozen=True)
class Adapter:
    """An implementation made of two ops that take windows.

    Args:
        name: of the implementation whose ops these are, by which terms say what argument they are.
    """

    name: str
    forward_op: ForwardOp
    backward_op: BackwardOp

    def forward(
        self,
        q: Float[Tensor, "b i hq d"],
        k: Float[Tensor, "b j hkv d"],
        v: Float[Tensor, "b j hkv vd"],
        block: Block,
        into: Partial,
    ) -> None:
        """Continues `into` with the block, one call for each of its windows."""
        q, k, v = _as_the_op_wants(q, k, v)
        q, scale, _ = positive(q, block.score.factor)
        for call in self._calls(q, k, v, scale, block):
            out, lse = self.forward_op(call)
            _merge_(into[call.window.rows], out[..., : into.acc.shape[-1]], lse.transpose(1, 2))

    def backward(
        self,
        of: Rows,
        k: Float[Tensor, "b j hkv d"],
        v: Float[Tensor, "b j hkv vd"],
        block: Block,
        into: RunningGradients,
        learned: Learned,
    ) -> None:
        """Adds the block's gradients to those wanted of dq, dk, dv, given out and lse of the whole rows.

        The op computes all three, and derives delta from `out` and `dout` itself, both in the type of q.
        """
        assert not learned, "blocks with learned tensors never come here"
        assert not of.lse_learns, "rows whose delta is not that of `out` never come here"
        out, dout = of.out.to(of.q.dtype), of.dout.to(of.q.dtype)
        q, k, v, out, dout = _as_the_op_wants(of.q, k, v, out, dout)
        q, scale, sign = positive(q, block.score.factor)
        for call in self._calls(q, k, v, scale, block):
            rows, cols = call.window.rows, call.window.cols
            lse = of.lse[:, rows].transpose(1, 2).contiguous()
            dq, dk, dv = self.backward_op(call, Attended(dout[:, rows], out[:, rows], lse))
            parts = (rows, dq, sign), (cols, dk, 1), (cols, dv, 1)
            for total, (part, grad, factor) in zip(into, parts, strict=True):
                if total is not None:
                    total[:, part].add_(grad[..., : total.shape[-1]], alpha=factor)

    def forward_whole(
        self,
        q: Float[Tensor, "b i hq d"],
        k: Float[Tensor, "b j hkv d"],
        v: Float[Tensor, "b j hkv vd"],
        block: Block,
    ) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]] | None:
        """(out, lse) of a block that is all there is, if one call gives them: see `dispatch.attend_whole`."""
        vd, shape = v.shape[-1], (q.shape[1], k.shape[1])
        q, k, v = _as_the_op_wants(q, k, v)
        q, scale, _ = positive(q, block.score.factor)
        call = _only(self._calls(q, k, v, scale, block))
        if call is None or _lengths(call)[0] != shape[0]:
            return None
        out, lse = self.forward_op(call)
        return out[..., :vd].contiguous(), lse.transpose(1, 2).contiguous()

    def backward_whole(
        self,
        dout: Float[Tensor, "b i hq vd"],
        q: Float[Tensor, "b i hq d"],
        k: Float[Tensor, "b j hkv d"],
        v: Float[Tensor, "b j hkv vd"],
        out: Float[Tensor, "b i hq vd"],
        lse: Float[Tensor, "b i hq"],
        block: Block,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(dq, dk, dv) of a block that is all there is, in the type of q, if one call gives them."""
        widths, shape = (q.shape[-1], k.shape[-1], v.shape[-1]), (q.shape[1], k.shape[1])
        q, k, v, out, dout = _as_the_op_wants(q, k, v, out, dout)
        q, scale, sign = positive(q, block.score.factor)
        call = _only(self._calls(q, k, v, scale, block))
        if call is None or _lengths(call) != shape or sign != 1:
            return None
        lse = lse.transpose(1, 2).contiguous()
        grads = self.backward_op(call, Attended(dout, out, lse))
        dq, dk, dv = (x[..., :w].contiguous() for x, w in zip(grads, widths, strict=True))
        return dq, dk, dv

    def _calls(self, q: Tensor, k: Tensor, v: Tensor, scale: float, block: Block) -> Iterator[Call]:
        terms: dict[str, Any] = {}
        for term in block.acting:
            if self.name in term.arguments:
                assert isinstance(term, ScoreTerm), "an argument is one value"
                terms[term.arguments[self.name]] = term.value
        for window in windows(block, q.shape[1], k.shape[1]):
            rows, cols = window.rows, window.cols
            yield Call(q[:, rows], k[:, cols], v[:, cols], window, scale, terms)


def _only(calls: Iterator[Call]) -> Call | None:
    """The call, if it is the only one."""
    first = next(calls, None)
    return first if next(calls, None) is None else None


# torch's FlashAttention-2: deterministic where `torch.use_deterministic_algorithms` asks for it.

_forward, _backward = attention_ops(CUDA_FLASH)


def _aten_forward(call: Call) -> tuple[Tensor, Tensor]:
    causal, options = _aten_options(call)
    out, lse, *_ = _forward(*call.qkv, None, None, *_lengths(call), 0.0, causal, False, **options)
    return out, lse


def _aten_backward(call: Call, rows: Attended) -> tuple[Tensor, Tensor, Tensor]:
    # The state of a dropout that is off, which is never read.
    seed = torch.empty(0, dtype=torch.uint64, device=call.q.device)
    causal, options = _aten_options(call)
    return _backward(
        rows.dout, *call.qkv, rows.out, rows.lse, None, None, *_lengths(call), 0.0, causal, seed, seed,
        **options,
    )  # fmt: skip


def _lengths(call: Call) -> tuple[int, int]:
    return call.q.shape[1], call.k.shape[1]


def _aten_options(call: Call) -> tuple[bool, dict[str, Any]]:
    """(is_causal, what is given by name). FlashAttention-4 under this op has no backward with a window."""
    assert not call.terms, "blocks with terms that change scores never come here"
    left, right = call.window.left, call.window.right
    if left is None and right == 0:
        return True, {"scale": call.scale, "window_size_left": None, "window_size_right": None}
    return False, {"scale": call.scale, "window_size_left": left, "window_size_right": right}


# The package flash-attn, version 2.7 or newer, whose functions are the ones under its own autograd.


def _package_forward(call: Call) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    options = _package_options(call)
    out, lse, *_ = _flash_attn_forward(*call.qkv, 0.0, call.scale, return_softmax=False, **options)
    return out, lse


def _package_backward(call: Call, rows: Attended) -> tuple[Tensor, Tensor, Tensor]:
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
# layouts. Its op has no window, so what needs one is done by torch's FlashAttention-2. By name only.

_cudnn, _cudnn_back = attention_ops(CUDNN)


def _cudnn_forward(call: Call) -> tuple[Tensor, Tensor]:
    causal = _is_causal(call)
    if causal is None:
        return _aten_forward(call)
    q, k, v = (x.transpose(1, 2) for x in call.qkv)
    out, lse, *_ = _cudnn(q, k, v, None, True, 0.0, causal, False, scale=call.scale)
    return out.transpose(1, 2), lse.reshape(q.shape[:3])


def _cudnn_backward(call: Call, rows: Attended) -> tuple[Tensor, Tensor, Tensor]:
    causal = _is_causal(call)
    if causal is None:
        return _aten_backward(call, rows)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (rows.dout, *call.qkv, rows.out))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of a dropout that is off
    dq, dk, dv = _cudnn_back(
        dout, q, k, v, out, rows.lse.unsqueeze(-1), seed, seed, None, None, None, *_lengths(call), 0.0,
        causal, scale=call.scale,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _is_causal(call: Call) -> bool | None:
    """Whether the op has to mask, or `None` where it cannot.

    Only squares: where a causal mask of another shape hangs is not documented. A single key it refuses.
    """
    (num_rows, num_cols), window = _lengths(call), call.window
    if num_cols == 1:
        return None
    if window.left is None and window.right is None:
        return False
    square = num_rows == num_cols and window.left is None and window.right == 0
    return True if square else None


ADAPTERS = {
    "aten": Adapter("aten", _aten_forward, _aten_backward),
    "flash_attn": Adapter("flash_attn", _package_forward, _package_backward),
    "cudnn": Adapter("cudnn", _cudnn_forward, _cudnn_backward),
}


def without_launches(adapter: Adapter) -> Adapter:
    """The adapter with ops that give tensors without content, for a dry run."""

    def forward(call: Call) -> tuple[Tensor, Tensor]:
        b, i, hq, _ = call.q.shape
        return torch.empty_like(call.q), call.q.new_empty((b, hq, i), dtype=torch.float32)

    def backward(call: Call, _: Attended) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = map(torch.empty_like, call.qkv)
        return dq, dk, dv

    return replace(adapter, forward_op=forward, backward_op=backward)


def _as_the_op_wants(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in one width, a multiple of 8, and every row at a multiple of 16 bytes."""
    widest = max(x.shape[-1] for x in tensors)
    width = -(-widest // ALIGNED) * ALIGNED
    for x in tensors:
        if x.shape[-1] < width:
            yield torch.nn.functional.pad(x, (0, width - x.shape[-1])).contiguous()
        else:
            yield x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _is_aligned(x: Tensor) -> bool:
    starts = (x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(s % ALIGNED == 0 for s in starts)


def _merge_(into: Partial, out: Float[Tensor, "b i hq vd"], lse: Float[Tensor, "b i hq"]) -> None:
    if fuses(out, None):
        from seqpar_kernels import triton_softmax

        triton_softmax.merge_((into.acc, into.m, into.l), out, lse)
    else:
        into.merge_(out, lse)
