"""Attends some queries to one rank's keys, and merges the parts of all ranks into one result."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.decode.rows import Held
from seqpar.decode.visible import seen
from seqpar.layout import Mask, Span
from seqpar_kernels import (
    Band,
    Block,
    Implementation,
    Partial,
    Score,
    accumulation_dtype,
    attend,
    finish,
)


def part_of(
    q: Float[Tensor, "b t hq d"],
    first: int,
    all_held: Iterable[Held],
    mask: Mask,
    score: Score,
    implementation: Implementation,
) -> Float[Tensor, "n vd1"]:
    """Attends queries at consecutive positions to the keys held here: out and lse, side by side.

    In the type of sums, one row for every query of every head: n = b * t * hq.
    Terms that join rows once are left out.

    Args:
        first: position of the first query.
        mask: `continued`.
        score: resolved.
    """
    all_held = list(all_held)
    t, (hkv, vd) = q.shape[1], all_held[0].v.shape[2:]
    # What all rows see is read once for all query heads of a kv head: these become rows. With 16 query and
    # 4 kv heads of 64 and 65536 keys that took a quarter of the time (float32, one core).
    folded = q.unflatten(2, (hkv, -1)).transpose(2, 3).flatten(1, 2)
    of_all, running = Partial.identity(folded, vd), Partial.identity(q, vd)

    def visit(q: Tensor, held: Held, cols: slice, block: Block, into: Partial) -> None:
        k, v = held.k[:, cols], held.v[:, cols]
        attend(q, k, v, block, into=into, implementation=implementation)

    for held in all_held:
        met = seen(Span(first, t), held.spans, mask, score)
        for cols in met.by_all:
            visit(folded, held, cols, Block(Band(), score), of_all)
        for rows, cols, block in met.by_some:
            visit(q[:, rows], held, cols, block, running[rows])
    sums = of_all.acc, of_all.m, of_all.l
    unfolded = (x.unflatten(1, (t, -1)).transpose(2, 3).flatten(2, 3) for x in sums)
    running.absorb_(Partial(*unfolded))
    # docs/design.md: sinks join once, in `finish`
    out, lse = finish(running, accumulation_dtype(q.dtype), Score(), implementation=implementation)
    return torch.cat((out, lse.unsqueeze(-1)), dim=-1).flatten(0, 2)


def merged(
    parts: Float[Tensor, "size i vd1"],
    dtype: torch.dtype,
    score: Score,
    implementation: Implementation,
) -> Float[Tensor, "i vd"]:
    """Merges the parts that ranks have of some rows by `part_of`, in rank order: the out of these rows.

    Args:
        score: whose tensors, one entry for each row here, join the rows once.
    """
    out, lse = parts[..., :-1], parts[..., -1]
    # To the kernels every row is a head of one row.
    running = Partial.identity(out[:1, None], out.shape[2])
    for out_r, lse_r in zip(out, lse, strict=True):
        # A normalised part is a partial of maximum lse and sum 1, or 0 where a row saw nothing.
        total = (lse_r > -torch.inf).to(lse_r.dtype)
        running.absorb_(Partial(out_r[None, None], lse_r[None, None], total[None, None]))
    return finish(running, dtype, score, implementation=implementation)[0][0, 0]
