"""Attention of one block of rows over all its keys as two opaque torch ops, forward and backward.

`torch.compile`, activation checkpointing and fake tensors see `seqpar::attention_forward` and
`seqpar::attention_backward` and never what is inside, which may depend on device and data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.block import Block, Rows
from seqpar_kernels.choice import Implementation, Request, choose
from seqpar_kernels.dispatch import attend, attend_backward, finish
from seqpar_kernels.documents import Documents
from seqpar_kernels.dropout import Dropout
from seqpar_kernels.partial import Partial, accumulation_dtype
from seqpar_kernels.score import Score, sink_gradient, sum_rows
from seqpar_kernels.torch_ops import define

# Tensors first; what follows describes the block. Ops take no dataclasses.
_BLOCK = (
    "Tensor? alibi_slopes, Tensor? sinks, int? lower, int? upper, float scale, float? softcap, "
    "int[4] place, float dropout, int seed, int[]? documents, bool lse_learns, str? implementation"
)


def attention(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]]:
    """(out, lse) of a block that holds all the keys of its rows. out is differentiable, lse is not.

    Gradients reach q, k, v and, where they learn, the block's ALiBi slopes and sinks.

    Raises:
        ValueError: hq is not a multiple of hkv.
        NotImplementedError: the implementation cannot do what is asked.
    """
    return torch.ops.seqpar.attention_forward(q, k, v, *_described(block), False, implementation)


def attention_with_lse(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]]:
    """(out, lse) as `attention`, both differentiable: forward and backward are of a kernel that can.

    Raises:
        ValueError: hq is not a multiple of hkv.
        NotImplementedError: the implementation cannot do what is asked, or cannot differentiate lse.
    """
    return torch.ops.seqpar.attention_forward(q, k, v, *_described(block), True, implementation)


def recalled(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    results: tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]],
    *,
    lse_learns: bool,
    implementation: Implementation | None = None,
) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]]:
    """(out, lse) as `attention`, or `attention_with_lse`, gave them for this call: only backward computes."""
    described = *_described(block), lse_learns, implementation
    return _Recalled.apply(q, k, v, *described, *results)


def _described(block: Block) -> tuple[Any, ...]:
    """The block as the ops take it."""
    score, drop = block.score, block.dropout
    return (
        score.alibi_slopes, score.sinks, block.band.lower, block.band.upper,
        score.factor, score.softcap, [block.row, block.col, block.step, block.head],
        drop.p if drop else 0.0, drop.seed if drop else 0,
        list(block.documents.bounds) if block.documents else None,
    )  # fmt: skip


def _block(
    slopes: Tensor | None,
    sinks: Tensor | None,
    lower: int | None,
    upper: int | None,
    scale: float,
    softcap: float | None,
    place: Sequence[int],
    dropout: float,
    seed: int,
    documents: Sequence[int] | None,
) -> Block:
    row, col, step, head = place
    return Block(
        Band(lower, upper),
        Score(scale, softcap, slopes, sinks),
        row=row,
        col=col,
        step=step,
        head=head,
        dropout=Dropout(dropout, seed) if dropout else None,
        documents=None if documents is None else Documents(tuple(documents)),
    )


def _forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *described, lse_learns, implementation = args
    block = _block(*described)
    # The forward of an implementation that has no such backward is not worth having.
    asked = Request.of(q, v, block.score, block.dropout, block.documents, lse=lse_learns)
    implementation = choose(asked, implementation)
    running = Partial.identity(q, v.shape[-1])
    attend(q, k, v, block, into=running, implementation=implementation)
    return finish(running, q.dtype, block.score.sinks, implementation=implementation)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    slopes_learn: bool,
    sinks_learn: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *described, _, implementation = args
    block = _block(*described)
    rows = Rows.of(q, out, dout, lse, dlse, implementation=implementation)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    by_row = torch.zeros_like(lse) if slopes_learn else None
    attend_backward(
        rows, k, v, block, into=(dq, dk, dv), dslopes=by_row, implementation=implementation
    )
    dslopes, dsinks = lse.new_empty(0), lse.new_empty(0)
    if by_row is not None:
        assert block.score.alibi_slopes is not None
        dslopes = sum_rows(by_row).to(block.score.alibi_slopes.dtype)
    if sinks_learn:
        assert block.score.sinks is not None
        dsinks = sink_gradient(block.score.sinks, lse, rows.delta)
    # An op may not give back one tensor twice, nor what it was given.
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dslopes, dsinks


def _backward_fake(
    dout: Tensor,  # noqa: ARG001
    dlse: Tensor | None,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # noqa: ARG001
    lse: Tensor,
    slopes_learn: bool,
    sinks_learn: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slopes, sinks = args[:2]
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        slopes.new_empty(slopes.shape) if slopes_learn else lse.new_empty(0),
        sinks.new_empty(sinks.shape) if sinks_learn else lse.new_empty(0),
    )  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, slopes, sinks, *ctx.described = inputs
    out, lse = output
    ctx.lse_learns = ctx.described[-2]
    if not ctx.lse_learns:
        ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, slopes, sinks, out, lse)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, slopes, sinks, out, lse = ctx.saved_tensors
    learn = ctx.needs_input_grad[3:5]
    dq, dk, dv, *learned = torch.ops.seqpar.attention_backward(
        dout,
        dlse if ctx.lse_learns else None,
        q,
        k,
        v,
        out,
        lse,
        *learn,
        slopes,
        sinks,
        *ctx.described,
    )
    gradients = (x if wanted else None for x, wanted in zip(learned, learn, strict=True))
    return dq, dk, dv, *gradients, *(None for _ in ctx.described)


class _Recalled(torch.autograd.Function):
    """q [b i hq d], k [b j hkv d], v [b j hkv vd] -> the given (out, lse).

    backward and saved are those of the op `attention_forward`
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, out, lse = args
        _save(ctx, tuple(inputs), (out, lse))
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, *grad_outputs), None, None


define(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_BLOCK}) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    save=_save,
    differentiate=_differentiate,
)
define(
    "attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"bool slopes_learn, bool sinks_learn, {_BLOCK}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
