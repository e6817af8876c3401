"""What is not finite is taken out before a block is computed, and put back where it is seen.

A hidden score has a weight of exactly zero, but 0 * NaN is NaN: a product would carry a NaN or an infinity
of one row to every row beside it. Zeros in its place change no bit of rows that do not see it. Those that do
become NaN afterwards. The Triton kernels do without: see `kernels/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.block import Block
from seqpar_kernels.finite import taken_out
from seqpar_kernels.partial import Partial
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.sight import sight_of
from seqpar_kernels.terms import Sums

Forward = Callable[[Tensor, Tensor, Tensor, Block, Partial], None]
Backward = Callable[[Rows, Tensor, Tensor, Block, RunningGradients, Learned], None]


def attend(
    compute: Forward,
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block as `compute` does, but what is not finite stays where it is seen."""
    sight, hq = sight_of(block, q, k), q.shape[2]
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
    sums: Sums = (),
) -> None:
    """Adds gradients as `compute` does, but what is not finite stays where it is seen.

    Weights, and so dv, know nothing of v; delta does.
    """
    (dq, dk, dv), hq, hkv = into, of.q.shape[2], k.shape[2]
    sight = sight_of(block, of.q, k)
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
    for _, total in sums:
        total.masked_fill_(reached.any(), torch.nan)
    if dq is not None:
        dq.masked_fill_(reached.unsqueeze(-1), torch.nan)
    if dk is not None and dv is not None:
        dk.masked_fill_((sight.by_columns(rows, hkv) | seen & cols).unsqueeze(-1), torch.nan)
        weights = sight.by_columns(scores, hkv) | seen & in_k.any(-1)
        dv.masked_fill_(weights.unsqueeze(-1) | sight.by_columns(in_dout, hkv), torch.nan)
