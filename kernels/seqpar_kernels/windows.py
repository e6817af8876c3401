"""What FlashAttention-2 wants of a block: windows for bands, one width, a positive scale.

Adapters to it walk the same windows and differ in the ops they call, so the loops are here. The op
rounds what it returns to the type of q: the out of every block, and every block's share of the gradients.
Source: Dao 2023, FlashAttention-2 (arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.aten import positive
from seqpar_kernels.band import Band
from seqpar_kernels.block import Block
from seqpar_kernels.choice import fuses
from seqpar_kernels.partial import Partial
from seqpar_kernels.rectangles import Rectangle, cut
from seqpar_kernels.rows import Gradients, Learned, Rows
from seqpar_kernels.terms import ScoreTerm

Arguments = dict[str, Any]  # of an op, for terms that it knows
ALIGNED = 8  # elements: the op loads 16 bytes at a time, and its widths are multiples of this


@dataclass(frozen=True)
class Window:
    """Rows and columns of a block under one window; `None` leaves that side open.

    Row i of nq sees column j of nk iff `i + nk - nq - left <= j <= i + nk - nq + right`: the window
    hangs at the bottom right. Every row sees at least one column, and left and right are below nk.
    """

    rows: slice
    cols: slice
    left: int | None
    right: int | None


class ForwardOp(Protocol):
    """Attention of some rows under one window."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, scale: float, terms: Arguments
    ) -> tuple[Tensor, Tensor]:
        """(out `[b i hq w]`, lse `[b hq i]`)."""


class BackwardOp(Protocol):
    """The gradients of a `ForwardOp`, given lse `[b hq i]` of the whole rows."""

    def __call__(
        self,
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
        """(dq, dk, dv), in the type of q."""


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
        terms = self._arguments(block)
        for window in windows(block, q.shape[1], k.shape[1]):
            rows, cols = window.rows, window.cols
            out, lse = self.forward_op(
                q[:, rows], k[:, cols], v[:, cols], window=window, scale=scale, terms=terms
            )
            _merge_(into[rows], out[..., : into.acc.shape[-1]], lse.transpose(1, 2))

    def backward(
        self,
        of: Rows,
        k: Float[Tensor, "b j hkv d"],
        v: Float[Tensor, "b j hkv vd"],
        block: Block,
        into: Gradients,
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
        terms = self._arguments(block)
        for window in windows(block, q.shape[1], k.shape[1]):
            rows, cols = window.rows, window.cols
            lse = of.lse[:, rows].transpose(1, 2).contiguous()
            dq, dk, dv = self.backward_op(
                dout[:, rows], q[:, rows], k[:, cols], v[:, cols], out[:, rows], lse,
                window=window, scale=scale, terms=terms,
            )  # fmt: skip
            parts = (rows, dq, sign), (cols, dk, 1), (cols, dv, 1)
            for total, (part, grad, factor) in zip(into, parts, strict=True):
                if total is not None:
                    total[:, part].add_(grad[..., : total.shape[-1]], alpha=factor)

    def _arguments(self, block: Block) -> Arguments:
        """What the op is told of the terms of the block, by the name of its argument."""
        given: Arguments = {}
        for term in block.acting:
            if self.name in term.arguments:
                assert isinstance(term, ScoreTerm), "an argument is one value"
                given[term.arguments[self.name]] = term.value
        return given


def windows(block: Block, num_rows: int, num_cols: int) -> Iterator[Window]:
    """Disjoint windows that together hold exactly the visible scores of the block.

    One for each part of the block, such as a document; three at most where it has more rows than columns.
    """
    for part in cut(block, num_rows, num_cols, _pieces):
        nq, nk = part.rows.stop - part.rows.start, part.cols.stop - part.cols.start
        lower, upper = part.band.lower, part.band.upper
        yield Window(
            part.rows,
            part.cols,
            left=None if lower is None or lower <= 1 - nq else nk - nq - lower,
            right=None if upper is None or upper >= nk - 1 else upper + nq - nk,
        )


def _pieces(band: Band, num_rows: int, num_cols: int) -> Iterator[Rectangle]:
    """The band less the rows and columns outside it, in parts that are one window each.

    Of nq rows and nk columns that are left, row 0 sees column 0 and row nq - 1 sees column nk - 1.
    The latter reads nq - 1 + lower <= nk - 1 <= nq - 1 + upper: left and right are not negative.

    The op takes a side of nk or more for an open one, and one open side beside a closed one for nk (as
    found in version 2.8 and in torch 2.13). Neither matters while nq <= nk: a bound that hides something
    has lower > 1 - nq or upper < nk - 1, so that left < nk - 1 or right < nq - 1, and row 0 with nk to
    the right still sees all. A taller block is cut where `upper` stops and where `lower` begins
    to bind. If no row is free of both, nk - upper > -lower, and right <= upper - lower < nk as it is.
    """
    seen = band.rows(num_rows, num_cols)
    if not seen:
        return
    cols = range(
        band.columns(seen[0], num_cols).start,
        band.columns(seen[-1], num_cols).stop,
    )
    band = band.at(seen.start, cols.start)
    for first, stop in pairwise((0, *_cuts(band, len(seen), len(cols)), len(seen))):
        if first < stop:
            yield Rectangle(
                slice(seen.start + first, seen.start + stop),
                slice(cols.start, cols.stop),
                band.at(first, 0),
            )


def _cuts(band: Band, nq: int, nk: int) -> tuple[int, ...]:
    """Where to cut the rows: the first that `upper` leaves alone, and the first that `lower` binds."""
    if nq <= nk:
        return ()
    free = 0 if band.upper is None else max(0, nk - band.upper)
    bound = nq if band.lower is None else min(nq, -band.lower)
    return (free, bound) if free <= bound else ()


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
