"""torch's FlexAttention as an implementation of a block: functions of one score, compiled for the GPU.

It knows no lse but its own, so backward is that of the block alone, with gradients of its out and lse that
give what the whole attention would. Source: He et al. 2024, FlexAttention (arXiv:2412.05496).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from seqpar_kernels.block import Block
from seqpar_kernels.partial import Partial, accumulation_dtype
from seqpar_kernels.region import FAR
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.terms import MaskMod, ScoreTerm, Spot, Sums, Term
from seqpar_kernels.terms.modifiers import apart
from seqpar_kernels.transfer import on_device


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block, which rounds its out to the type of q."""
    with torch.no_grad():
        out, lse = _attended(q, k, v, block)
    # A row that sees nothing of the block has an lse of -inf.
    into.absorb_(Partial(out.to(into.acc.dtype), lse, (lse > -torch.inf).to(lse.dtype)))


def backward(
    of: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: RunningGradients,
    learned: Learned,
    sums: Sums = (),
) -> None:
    """Adds the block's gradients to those wanted, by going back through the block once more.

    With w = exp(own lse - lse) of a row, its weights are w times those of the block alone. So the block's
    gradients are those that it gives for w * dout of its out and own delta - w * delta of its lse, where own
    delta is rowsum(own out * w * dout).
    """
    by_row = [(x, learned[name]) for name, x in block.score.tensors.items() if name in learned]
    held = [x for x, _ in (*sums, *by_row)]
    # docs/design.md: FlexAttention goes back through a block alone
    with apart():
        q, k, v = (x.detach().requires_grad_() for x in (of.q, k, v))
        out, lse = _attended(q, k, v, block)
        with torch.no_grad():
            share = torch.exp(lse - of.lse).masked_fill(lse == -torch.inf, 0.0)
            dout = (of.dout * share.unsqueeze(-1)).to(out.dtype)
            dlse = (out.to(lse.dtype) * dout).sum(-1) - share * of.delta
        wanted = [q, k, v, *held]
        grads = torch.autograd.grad((out, lse), wanted, (dout, dlse), allow_unused=True)
    for total, grad in zip((*into, *(total for _, total in sums)), grads, strict=False):
        if total is not None and grad is not None:
            total += grad
    # Each row's share is asked for, of which the sum over rows counts.
    for (_, rows), grad in zip(by_row, grads[3 + len(sums) :], strict=True):
        if grad is not None:
            rows[0, 0] += grad


def _attended(
    q: Tensor, k: Tensor, v: Tensor, block: Block
) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]]:
    """(out, lse) of the block alone."""
    (b, i, hq, _), (j, hkv) = q.shape, k.shape[1:3]
    at = _Numbers(block, q)
    mods = [term for term in block.acting if isinstance(term, MaskMod)]
    changing = [at.with_tensor(term) for term in block.acting if term.changes_scores]
    limits = block.row_limits(i, j, q.device)
    each = (b, hq) if mods else (None, None)
    kind = (
        torch.is_grad_enabled(), q.dtype, b, hq, hkv, q.shape[3], v.shape[3], limits is None,
        *map(_kind, (*mods, *changing)),
    )  # fmt: skip
    blocks = _block_mask(kind)(_visible(at, limits, mods), *each, i, j, device=q.device)
    out, aux = _flex(kind)(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=_score(at, changing),
        block_mask=blocks,
        scale=1.0,
        enable_gqa=hq != hkv,
        return_aux=AuxRequest(lse=True),
    )
    return out.transpose(1, 2), aux.lse.transpose(1, 2)


class _Numbers:
    """What the numbers of a block are, in tensors: others compile nothing anew."""

    def __init__(self, block: Block, q: Tensor) -> None:
        lower = -FAR if block.band.lower is None else block.band.lower
        upper = FAR if block.band.upper is None else block.band.upper
        numbers = lower, upper, block.row, block.col, block.step, block.head, block.batch
        self.lower, self.upper, *self._corner = on_device(numbers, q.device).unbind()
        self._like = torch.empty((), dtype=accumulation_dtype(q.dtype)), q.device
        self.scale = self._number(block.score.factor)

    def with_tensor(self, term: Term) -> Term:
        """The term, whose value is a tensor where it was a number."""
        if isinstance(term, ScoreTerm) and isinstance(term.value, float):
            return replace(term, value=self._number(term.value))
        return term

    def _number(self, x: float) -> Float[Tensor, ""]:
        like, device = self._like
        return on_device(like.new_tensor(x), device)

    def spot(self, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Spot:
        """The score of a row and a column, both counted in the block."""
        row, col, step, first_head, first_batch = self._corner
        return Spot(batch + first_batch, head + first_head, head, row + i * step, col + j * step)


def _visible(
    at: _Numbers, limits: Tensor | None, mods: Iterable[MaskMod]
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Bool[Tensor, ""]]:
    """What rows see, as FlexAttention's `mask_mod`."""
    first, end = (None, None) if limits is None else limits.unbind(1)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shown = (j - i >= at.lower) & (j - i <= at.upper)
        if first is not None and end is not None:
            shown = shown & (j >= first[i]) & (j < end[i])
        spot = at.spot(batch, head, i, j)
        for mod in mods:
            shown = shown & mod.value(spot.batch, spot.head, spot.row, spot.col)
        return shown

    return visible


def _score(at: _Numbers, terms: Iterable[Term]) -> Callable[..., Float[Tensor, ""]]:
    """What is done to scores, as FlexAttention's `score_mod`."""

    def score(s: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        spot, s = at.spot(batch, head, i, j), s * at.scale
        for term in terms:
            s = term.modify(s, spot)
        return s

    return score


def _kind(term: Term) -> Hashable:
    """What of a term is compiled anew."""
    value = term.value if isinstance(term, (ScoreTerm, MaskMod)) else None
    if isinstance(value, Tensor):
        return type(term), value.dtype, value.ndim, value.requires_grad
    return type(term), getattr(value, "__code__", type(value))


@cache
def _flex(kind: Hashable) -> Callable[..., Any]:  # noqa: ARG001 - each has its own
    """FlexAttention for calls of a kind. Others do not count towards its limit of graphs."""
    # A graph that is not whole would be the dense one, of which the memory grows with N^2.
    return torch.compile(_with_own_graphs(flex_attention), fullgraph=True)


@cache
def _block_mask(kind: Hashable) -> Callable[..., Any]:  # noqa: ARG001
    """What makes the blocks of scores that a mask shows, for calls of a kind."""
    return torch.compile(_with_own_graphs(create_block_mask))


def _with_own_graphs(call: Callable[..., Any]) -> Callable[..., Any]:
    """The function as another one to the compiler, which counts graphs by code object."""

    def run(*args: Any, **options: Any) -> Any:
        return call(*args, **options)

    run.__code__ = run.__code__.replace()
    return run
