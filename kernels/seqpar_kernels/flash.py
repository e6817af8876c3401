"""Attention on CUDA by ops that take windows, as implementations of a block.

A window stands where a block has a band. Each op rounds what it returns to the type of q: the out of every
block, and every block's share of the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.aten import positive
from seqpar_kernels.beginnings import ADDED, Begins, first_touches, put
from seqpar_kernels.block import Block
from seqpar_kernels.choice import fuses
from seqpar_kernels.flash_ops import (
    Attended,
    BackwardOp,
    Call,
    ForwardOp,
    aten_backward,
    aten_forward,
    cudnn_backward,
    cudnn_forward,
    lengths,
    package_backward,
    package_forward,
)
from seqpar_kernels.partial import Partial
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.terms import ScoreTerm
from seqpar_kernels.windows import windows

ALIGNED = 8  # elements: the ops load 16 bytes at a time, and their widths are multiples of this


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
        begins: Begins = ADDED,
    ) -> None:
        """Adds the block's gradients to those wanted of dq, dk, dv, given out and lse of the whole rows.

        Those that begin are written.

        The op computes all three, and derives delta from `out` and `dout` itself, both in the type of q.
        """
        assert not learned, "blocks with learned tensors never come here"
        assert not of.lse_learns, "rows whose delta is not that of `out` never come here"
        out, dout = of.out.to(of.q.dtype), of.dout.to(of.q.dtype)
        q, k, v, out, dout = _as_the_op_wants(of.q, k, v, out, dout)
        q, scale, sign = positive(q, block.score.factor)
        calls = [*self._calls(q, k, v, scale, block)]
        by_rows = first_touches([call.window.rows for call in calls], into[0], begins=begins[0])
        by_cols = first_touches([call.window.cols for call in calls], *into[1:], begins=begins[1])
        for call, begins_q, begins_kv in zip(calls, by_rows, by_cols, strict=True):
            rows, cols = call.window.rows, call.window.cols
            lse = of.lse[:, rows].transpose(1, 2).contiguous()
            dq, dk, dv = self.backward_op(call, Attended(dout[:, rows], out[:, rows], lse))
            parts = (rows, dq, sign, begins_q), (cols, dk, 1, begins_kv), (cols, dv, 1, begins_kv)
            for total, (part, grad, factor, first) in zip(into, parts, strict=True):
                if total is not None:
                    put(total[:, part], grad[..., : total.shape[-1]], factor, begins=first)

    def forward_whole(
        self,
        q: Float[Tensor, "b i hq d"],
        k: Float[Tensor, "b j hkv d"],
        v: Float[Tensor, "b j hkv vd"],
        block: Block,
    ) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]] | None:
        """(out, lse) of a block that all rows see some of, if one call gives them."""
        vd, shape = v.shape[-1], (q.shape[1], k.shape[1])
        q, k, v = _as_the_op_wants(q, k, v)
        q, scale, _ = positive(q, block.score.factor)
        call = _only(self._calls(q, k, v, scale, block))
        if call is None or lengths(call)[0] != shape[0]:
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
        if call is None or lengths(call) != shape or sign != 1:
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


ADAPTERS = {
    "aten": Adapter("aten", aten_forward, aten_backward),
    "flash_attn": Adapter("flash_attn", package_forward, package_backward),
    "cudnn": Adapter("cudnn", cudnn_forward, cudnn_backward),
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
