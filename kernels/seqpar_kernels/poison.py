"""What is not finite is taken out before a block is computed, and put back where it is seen.

A hidden score has a weight of exactly zero, but 0 * NaN is NaN: a product would carry a NaN or an infinity
of one row to every row beside it. Zeros in its place change no bit of rows that do not see it. Those that do
become NaN afterwards. The Triton kernels do without: see `kernels/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqpar_kernels.block import Block
from seqpar_kernels.partial import Partial, accumulation_dtype
from seqpar_kernels.rows import Learned, Rows, RunningGradients

Forward = Callable[[Tensor, Tensor, Tensor, Block, Partial], None]
Backward = Callable[[Rows, Tensor, Tensor, Block, RunningGradients, Learned], None]


def may_hold(*tensors: Tensor) -> bool:
    """Whether to expect something that is not finite. Off the CPU always: no device is waited for.

    A sum that overflows is taken for it, which costs time and no bit.
    """
    if tensors[0].device.type == "meta":
        return False
    if tensors[0].device.type != "cpu":
        return True
    return not all(x.sum(dtype=accumulation_dtype(x.dtype)).isfinite() for x in tensors)


def taken_out(
    x: Float[Tensor, "b s h w"],
) -> tuple[Float[Tensor, "b s h w"], Bool[Tensor, "b s h w"]]:
    """(the tensor with zeros for what is not finite, where that was)."""
    bad = ~x.isfinite()
    return x.masked_fill(bad, 0.0), bad


@dataclass(frozen=True)
class Sight:
    """Who sees whom in a block: a range (first, last + 1) of columns per row, and of rows per column."""

    columns: Int[Tensor, "i 2"]
    rows: Int[Tensor, "j 2"]

    @staticmethod
    def of(block: Block, num_rows: int, num_cols: int, device: torch.device) -> Sight:
        """The ranges that the band and the terms of a block leave."""
        i, j, (lower, upper) = num_rows, num_cols, (block.band.lower, block.band.upper)
        before, behind = (None if x is None else -x for x in (upper, lower))
        return Sight(
            _ranges(lower, upper, i, j, block.row_limits(i, j, device), device),
            _ranges(before, behind, j, i, block.col_limits(i, j, device), device),
        )

    def by_rows(self, bad: Bool[Tensor, "b j h *w"], hq: int) -> Bool[Tensor, "b i hq *w"]:
        """Whether a row of a query head sees anything bad of the columns of its kv head."""
        seen = _any_inside(bad, self.columns)
        return seen.repeat_interleave(hq // bad.shape[2], 2)

    def by_columns(self, bad: Bool[Tensor, "b i hq *w"], hkv: int) -> Bool[Tensor, "b j hkv *w"]:
        """Whether a column of a kv head is seen by any bad row of its query heads."""
        return _any_inside(bad.unflatten(2, (hkv, -1)).any(3), self.rows)


def attend(
    compute: Forward,
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block as `compute` does, but what is not finite stays where it is seen."""
    sight, hq = Sight.of(block, q.shape[1], k.shape[1], q.device), q.shape[2]
    (q, in_q), (k, in_k), (v, in_v) = (taken_out(x) for x in (q, k, v))
    compute(q, k, v, block, into)
    sees = sight.by_rows(torch.ones_like(in_k[..., 0]), hq)
    scores = sees & in_q.any(-1) | sight.by_rows(in_k.any(-1), hq)
    into.l.masked_fill_(scores, torch.nan)
    into.acc.masked_fill_(scores.unsqueeze(-1) | sight.by_rows(in_v, hq), torch.nan)


def attend_backward(
    compute: Backward,
    of: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: RunningGradients,
    learned: Learned,
) -> None:
    """Adds gradients as `compute` does, but what is not finite stays where it is seen.

    Weights, and so dv, know nothing of v; delta does.
    """
    (dq, dk, dv), hq, hkv = into, of.q.shape[2], k.shape[2]
    sight = Sight.of(block, of.q.shape[1], k.shape[1], k.device)
    (q, in_q), (k, in_k), (v, in_v) = (taken_out(x) for x in (of.q, k, v))
    (out, in_out), (dout, in_dout) = (taken_out(x) for x in (of.out, of.dout))
    scores = in_q.any(-1) | of.lse.isnan() | (of.lse == torch.inf)
    rows = scores | in_dout.any(-1) | in_out.any(-1) | ~of.delta.isfinite()
    cols = in_k.any(-1) | in_v.any(-1)
    # With an lse of infinity all weights of a row are zero.
    lse, delta = of.lse.masked_fill(scores, torch.inf), of.delta.masked_fill(rows, 0.0)
    clean = replace(of, q=q, out=out, dout=dout, lse=lse, delta=delta)
    compute(clean, k, v, block, into, learned)
    seen = sight.by_columns(torch.ones_like(rows), hkv)
    reached = sight.by_rows(torch.ones_like(cols), hq) & rows | sight.by_rows(cols, hq)
    for total in learned.values():
        total.masked_fill_(reached, torch.nan)
    if dq is not None:
        dq.masked_fill_(reached.unsqueeze(-1), torch.nan)
    if dk is not None and dv is not None:
        dk.masked_fill_((sight.by_columns(rows, hkv) | seen & cols).unsqueeze(-1), torch.nan)
        weights = sight.by_columns(scores, hkv) | seen & in_k.any(-1)
        dv.masked_fill_(weights.unsqueeze(-1) | sight.by_columns(in_dout, hkv), torch.nan)


def _ranges(
    lower: int | None,
    upper: int | None,
    length: int,
    num_others: int,
    limits: Int[Tensor, "length 2"] | None,
    device: torch.device,
) -> Int[Tensor, "length 2"]:
    """The range of others that each index sees, which is no narrower than nothing."""
    index = torch.arange(length, device=device)
    first = torch.zeros_like(index) if lower is None else (index + lower).clamp(0, num_others)
    end = (
        torch.full_like(index, num_others)
        if upper is None
        else (index + upper + 1).clamp(0, num_others)
    )
    if limits is not None:
        first, end = torch.maximum(first, limits[:, 0]), torch.minimum(end, limits[:, 1])
    return torch.stack((first, torch.maximum(first, end)), dim=1)


def _any_inside(
    bad: Bool[Tensor, "b n h *w"], ranges: Int[Tensor, "m 2"]
) -> Bool[Tensor, "b m h *w"]:
    """Whether anything bad lies inside each range."""
    before = bad.new_zeros((bad.shape[0], bad.shape[1] + 1, *bad.shape[2:]), dtype=torch.int32)
    torch.cumsum(bad, 1, dtype=torch.int32, out=before[:, 1:])
    first, end = (before.index_select(1, x) for x in ranges.unbind(1))
    return end > first
