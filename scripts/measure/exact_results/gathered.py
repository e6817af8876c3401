"""A strategy on any number of ranks, its results put back in the order of positions."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import torch
from torch import Tensor

from seqpar import Group, simulate
from seqpar.strategies import STRATEGIES as ALL
from seqpar.testing import NAMES, Case, run_step
from seqpar_kernels import Implementation

STRATEGIES: dict[str, str] = {  # with the layout it likes best under a causal mask
    "ring": "zigzag",
    "ulysses": "contiguous",
    "allgather": "zigzag",
    "mesh": "striped",
    "hybrid": "zigzag",
    "materialised_rows": "zigzag",
}
Results = tuple[Tensor, ...]


def run(size: int, case: Case, strategy: str, implementation: Implementation | None) -> Results:
    """(out, dq, dk, dv) of a number of ranks in the order of positions, then the learned, summed."""
    if ALL[strategy].needs_grid:
        degree = max(n for n in range(1, isqrt(size) + 1) if size % n == 0)
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        case = replace(case, degree=divisors.index(degree))

    def on_each_rank(group: Group) -> Results:
        mine = case.layout(size).positions(group.rank)
        local = (x[:, mine] for x in case.tensors())
        return run_step(*local, case.plan(group, strategy, implementation)).results

    results = simulate(size, on_each_rank)
    order = torch.cat([case.layout(size).positions(rank) for rank in range(size)]).argsort()
    return tuple(
        torch.cat(shares, 1)[:, order] if name in NAMES else sum(shares)
        for name, *shares in zip(case.names, *results, strict=True)
    )
