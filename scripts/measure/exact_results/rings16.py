"""Rings that round to 16 bits between hops, emulated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exact_results.gathered import Results
from seqpar import Group, Plan, Score
from seqpar.layout import Layout
from seqpar.testing import Case
from seqpar_kernels import Implementation, Partial, Rows, attend, attend_backward, finish

ROUNDING = {"16-bit blocks": torch.float32, "16-bit sums": torch.bfloat16}


def rounding_ring(
    case: Case, layout: Layout, implementation: Implementation, kept: torch.dtype
) -> Results:
    """(out, dq, dk, dv) of a ring that gets every block's results in the 16 bits of its inputs.

    The ranks are worked through in turn. A hop's block is attended whole and its out, dq, dk and dv are
    rounded; lse stays in float32. out becomes out - sigmoid(block_lse - lse) (out - block_out); dq, and
    the sums of dk and dv that travel with their block, have the hop's added. Between hops all of these are
    in `kept`. Each merge is computed in float32 and rounded once, which is kinder than torch's own
    arithmetic on bfloat16 tensors.

    With float32 kept this is how ring-flash-attention and, by default, PyTorch's context parallelism treat
    numbers. With bfloat16 kept it is how the point-to-point ring of TransformerEngine treats out (which it
    weights by the lse of all hops instead), dq, dk and dv without FP8. Emulated are the roundings and the
    order of hops, not their kernels.
    """
    q, k, v, dout = (
        [x[:, layout.positions(rank)] for rank in range(layout.size)] for x in case.tensors()
    )
    plan, score = Plan(Group.alone(), layout, case.mask), Score().resolve(case.d)
    dtype, spans = case.dtype, layout.spans

    def meetings() -> Iterator[tuple[int, int, list[Any]]]:
        for hop in range(layout.size):
            for rank in range(layout.size):
                owner = (rank - hop) % layout.size
                blocks = list(plan.blocks(spans[rank], spans[owner], case.mask, score, 0, 0))
                if blocks:
                    yield rank, owner, blocks

    out: dict[int, Tensor] = {}
    lse: dict[int, Tensor] = {}
    for rank, owner, blocks in meetings():
        running = Partial.identity(q[rank], case.vd)
        for rows, cols, block in blocks:
            attend(
                q[rank][:, rows], k[owner][:, cols], v[owner][:, cols], block,
                into=running[rows], implementation=implementation,
            )  # fmt: skip
        block_out, block_lse = finish(running, dtype, Score(), implementation=implementation)
        if rank not in out:
            out[rank], lse[rank] = block_out.to(kept), block_lse
            continue
        weight = torch.sigmoid(block_lse - lse[rank]).unsqueeze(-1)
        before = out[rank].float()
        out[rank] = (before - weight * (before - block_out.float())).to(kept)
        lse[rank] = lse[rank] - F.logsigmoid(lse[rank] - block_lse)

    dq, dk, dv = ([torch.zeros_like(x, dtype=kept) for x in xs] for xs in (q, k, v))
    for rank, owner, blocks in meetings():
        mine = Rows.of(
            q[rank], out[rank].to(dtype), dout[rank], lse[rank], None, implementation=implementation
        )
        shares = [
            torch.zeros_like(x[n], dtype=torch.float32)
            for x, n in zip((q, k, v), (rank, owner, owner), strict=True)
        ]
        for rows, cols, block in blocks:
            into = shares[0][:, rows], shares[1][:, cols], shares[2][:, cols]
            attend_backward(
                mine[rows], k[owner][:, cols], v[owner][:, cols], block,
                into=into, implementation=implementation,
            )  # fmt: skip
        for total, share in zip((dq[rank], dk[owner], dv[owner]), shares, strict=True):
            total.copy_(total.float() + share.to(dtype).float())
    order = torch.cat([layout.positions(rank) for rank in range(layout.size)]).argsort()
    ranks = range(layout.size)
    return tuple(torch.cat([x[n].to(dtype) for n in ranks], 1)[:, order] for x in (out, dq, dk, dv))
