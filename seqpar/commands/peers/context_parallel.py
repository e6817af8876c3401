"""torch's own context parallel attention, given torch's op for the CPU, which its dispatch does not know.

As torch has it by default: keys and values are gathered at once, gradients go round a ring.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.commands.peers import one_device
from seqpar.commands.peers.one_device import Attend
from seqpar_kernels.derivatives import first_only


def balanced(causal: bool) -> Attend:
    """Attention of all ranks of this process, in its balanced layout."""
    assert causal, "its balanced layout is for causal masks"
    module = import_module("torch.distributed.tensor.experimental._context_parallel._attention")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _Ring.apply(module, q, k, v).transpose(1, 2)

    return attend


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = module._templated_ring_attention(
            dist.group.WORLD, 2, _op, q, k, v, is_causal=True
        )[:2]
        ctx.module = module
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @first_only
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.module._templated_ring_attention_backward(
            dist.group.WORLD, 2, _op_backward, dout, "grad_out", q, k, v, out, lse, is_causal=True
        )[:3]
        return None, dq, dk, dv


def _op(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> tuple[Tensor, ...]:
    return one_device.forward(q, k, v, causal=is_causal)


def _op_backward(
    *, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    is_causal: bool, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return one_device.backward(grad_out, query, key, value, out, logsumexp, causal=is_causal)
