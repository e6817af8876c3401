"""Attention of one block of rows over all its keys as two opaque torch ops, forward and backward.

`torch.compile`, activation checkpointing and fake tensors see `seqpar::attention_forward` and
`seqpar::attention_backward` and never what is inside, which may depend on device and data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.block import Block
from seqpar_kernels.choice import Implementation, Request, choose
from seqpar_kernels.derivatives import first_only
from seqpar_kernels.dispatch import attend_backward
from seqpar_kernels.partial import accumulation_dtype
from seqpar_kernels.rows import Rows, sums_for
from seqpar_kernels.score import BY_BLOCKS, TENSORS, Score, finished_gradients, sum_rows, tables
from seqpar_kernels.terms import TERMS, ScoreTerm
from seqpar_kernels.torch_internals import nobody_looks
from seqpar_kernels.torch_ops import define
from seqpar_kernels.way import is_triton, way_of
from seqpar_kernels.whole import attend_whole, attend_whole_backward

# Ops take no dataclasses. Tensors first; what follows describes the block.
_TERMS = tuple(kind for kind in TERMS if kind.name not in TENSORS and not kind.asks_each)
_NUM_ARGUMENTS = {kind: len(tuple(kind.schema())) for kind in _TERMS}
_BLOCK = ", ".join((
    *(f"Tensor? {name}" for name in TENSORS),
    "int? lower, int? upper, float scale, int[5] place",
    *(f"{type_} {name}" for kind in _TERMS for type_, name in kind.schema()),
    "bool lse_learns, str? implementation",
))  # fmt: skip


def attention(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]]:
    """(out, lse) of a block that holds all the keys of its rows. out is differentiable, lse is not.

    Gradients reach q, k, v and, where they learn, the tensors of the block's score.

    Raises:
        ValueError: hq is not a multiple of hkv.
        NotImplementedError: the implementation cannot do what is asked.
    """
    return _attended(q, k, v, block, implementation, lse_learns=False)


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
    return _attended(q, k, v, block, implementation, lse_learns=True)


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


def _attended(
    q: Tensor, k: Tensor, v: Tensor, block: Block, implementation: Implementation | None, *, lse_learns: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = [block.score.tensors.get(name) for name in TENSORS]
    # docs/design.md: an op where somebody looks
    if not nobody_looks((q, k, v, *tensors)):
        op = torch.ops.seqpar.attention_forward
        return op(q, k, v, *_described(block), lse_learns, implementation)
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, *tensors)
    ):
        return _Attention.apply(q, k, v, *tensors, block, lse_learns, implementation)
    return _forward(q, k, v, block, implementation, lse_learns=lse_learns)


def _described(block: Block) -> list[Any]:
    """The block as the ops take it."""
    given = {type(term): term.written() for term in block.acting}
    values: list[Any] = [block.score.tensors.get(name) for name in TENSORS]
    values += block.band.lower, block.band.upper, block.score.factor
    values.append([block.row, block.col, block.step, block.head, block.batch])
    for kind in _TERMS:
        values += given.get(kind) or [None] * _NUM_ARGUMENTS[kind]
    return values


def _block(*described: Any) -> Block:
    """The block that was `_described`."""
    values = iter(described)
    fields = {name: next(values) for name in TENSORS}
    lower, upper, scale, place = (next(values) for _ in range(4))
    row, col, step, head, batch = place
    terms = []
    for kind in _TERMS:
        term = kind.read([next(values) for _ in range(_NUM_ARGUMENTS[kind])])
        if isinstance(term, ScoreTerm):
            fields[kind.name] = term.value
        elif term is not None:
            terms.append(term)
    score = replace(Score(scale), **fields)
    return Block(Band(lower, upper), score, row, col, step, head, batch, tuple(terms))


def _scored(block: Block, score: Score) -> Block:
    """The block with another score."""
    return block if score is block.score else replace(block, score=score)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, block: Block, implementation: Implementation | None, *, lse_learns: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # The forward of an implementation that has no such backward is not worth having.
    asked = Request.of(q, v, block.acting, lse=lse_learns)
    implementation = choose(asked, implementation)
    return attend_whole(q, k, v, block, implementation=implementation)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _forward_op(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *described, lse_learns, implementation = args
    return _forward(q, k, v, _block(*described), implementation, lse_learns=lse_learns)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    learn: Sequence[bool],
    block: Block,
    implementation: Implementation | None,
) -> list[Tensor]:
    score, wanted = block.score, [n for n, learns in zip(TENSORS, learn, strict=True) if learns]
    if dlse is None and not wanted:
        at_once = attend_whole_backward(
            dout, q, k, v, out, lse, block, implementation=implementation
        )
        if at_once is not None:
            return list(at_once)
    rows = Rows.of(q, out, dout, lse, dlse, implementation=implementation)
    # Nothing comes after this block, so what can round as it writes does.
    way = way_of(q, v, block, implementation, lse_learns=dlse is not None)
    dtype = q.dtype if is_triton(way) and way.rounds(q.dtype) else lse.dtype
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    by_row = {name: torch.zeros_like(lse) for name in wanted if name in BY_BLOCKS}
    of_tables = tables(score, wanted)
    sums = sums_for(of_tables.values())
    attend_backward(
        rows, k, v, block, into=(dq, dk, dv), learned=by_row, sums=sums, implementation=implementation,
        begins=(True, True),
    )  # fmt: skip
    by_row |= finished_gradients(score, lse, rows.delta, wanted)
    found = {name: sum_rows(x) for name, x in by_row.items()}
    found |= {name: total for name, (_, total) in zip(of_tables, sums, strict=True)}
    learned = [found[name].to(score.tensors[name].dtype) for name in wanted]
    # An op may not give back one tensor twice, nor what it was given.
    return [dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *learned]


def _backward_op(*args: Any) -> list[Tensor]:
    dout, dlse, q, k, v, out, lse, learn, *described, _, implementation = args
    return _backward(dout, dlse, q, k, v, out, lse, learn, _block(*described), implementation)


def _backward_fake(
    dout: Tensor,  # noqa: ARG001
    dlse: Tensor | None,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,  # noqa: ARG001
    lse: Tensor,  # noqa: ARG001
    learn: Sequence[bool],
    *args: Any,
) -> list[Tensor]:
    learned = [x for x, learns in zip(args, learn, strict=False) if learns]
    return [x.new_empty(x.shape) for x in (q, k, v, *learned)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    count = 3 + len(TENSORS)
    ctx.described = inputs[count:]
    _save_tensors(ctx, inputs[:count], output, lse_learns=ctx.described[-2])


def _save_tensors(
    ctx: Any, inputs: Sequence[Tensor | None], output: tuple[Tensor, Tensor], *, lse_learns: bool
) -> None:
    q, k, v, *tensors = inputs
    out, lse = output
    ctx.lse_learns = lse_learns
    if not lse_learns:
        ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, *tensors)


def _differentiate(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    learn = list(ctx.needs_input_grad[3 : 3 + len(TENSORS)])
    dq, dk, dv, *learned = torch.ops.seqpar.attention_backward(
        dout, dlse if ctx.lse_learns else None, q, k, v, out, lse, learn, *tensors, *ctx.described
    )
    there = iter(learned)
    gradients = (next(there) if learns else None for learns in learn)
    return dq, dk, dv, *gradients, *(None for _ in ctx.described)


class _Attention(torch.autograd.Function):
    """q [b i hq d], k [b j hkv d], v [b j hkv vd] -> out [b i hq vd], lse [b i hq].

    backward  dq, dk, dv, and gradients of the score's tensors
    saved     q k v out lse
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, *tensors, block, lse_learns, implementation = args
        out, lse = _forward(q, k, v, block, implementation, lse_learns=lse_learns)
        _save_tensors(ctx, (q, k, v, *tensors), (out, lse), lse_learns=lse_learns)
        # The tensors of the score are saved as tensors are, so that hooks see them, and not in it.
        ctx.block, ctx.implementation = (
            _scored(block, block.score.without_tensors()),
            implementation,
        )
        return out, lse

    @staticmethod
    @first_only
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        block, implementation = ctx.block, ctx.implementation
        if not nobody_looks((dout,)):  # now, such as a compiler of backward
            ctx.described = *_described(block)[len(TENSORS) :], ctx.lse_learns, implementation
            return *_differentiate(ctx, dout, dlse)[: 3 + len(TENSORS)], None, None, None
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if any(x is not None for x in tensors):
            by_name = dict(zip(TENSORS, tensors, strict=True))
            block = _scored(block, block.score.with_tensors(by_name))
        learn = ctx.needs_input_grad[3 : 3 + len(TENSORS)]
        dq, dk, dv, *learned = _backward(
            dout,
            dlse if ctx.lse_learns else None,
            q,
            k,
            v,
            out,
            lse,
            learn,
            block,
            implementation,
        )
        left = iter(learned)
        return dq, dk, dv, *(next(left) if learns else None for learns in learn), None, None, None


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
    @first_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, *grad_outputs), None, None


define(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_BLOCK}) -> (Tensor, Tensor)",
    _forward_op,
    fake=_forward_fake,
    save=_save,
    differentiate=_differentiate,
)
define(
    "attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"bool[] learn, {_BLOCK}) -> Tensor[]",
    _backward_op,
    fake=_backward_fake,
)
