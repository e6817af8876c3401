"""What a strategy sends, by a dry run and counted in a small step.

In a dry run nothing is sent.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from seqpar import Group, Mask, Plan, simulate
from seqpar.calls import Shape, Volume, dry_run
from seqpar.comm import silent
from seqpar.layout import LAYOUTS, Layout
from seqpar.testing import run_step

COUNTED_ROWS, COUNTED_D = 4, 16  # of a rank and of a head where bytes are counted
TILE_ROWS = 64  # of a rank, where bits must not depend on the number of ranks


@dataclass(frozen=True)
class Way:
    """A strategy, on a grid of so many columns (the mesh) or Ulysses ranks (the hybrid)."""

    strategy: str
    columns: int = 0
    invariant: bool = False

    def name(self, ranks: int) -> str:
        """As it is printed."""
        grid = f" {ranks // self.columns} x {self.columns}" if self.columns else ""
        return self.strategy.replace("_", " ") + grid + ", in order" * self.invariant

    def plan(self, group: Group, layout: Layout, mask: Mask) -> Plan:
        """Its plan; with the reference kernels, which like Triton's need no `out` in backward."""
        grid = group.grid(ulysses=self.columns) if self.columns else None
        return Plan(
            group, layout, mask, strategy=self.strategy, implementation="reference",
            invariant=self.invariant, grid=grid,
        )  # fmt: skip


def derived(way: Way, ranks: int, layout: Layout, mask: Mask, shape: Shape) -> list[Volume]:
    """What ranks send; all, or one that stands for all where pieces are many and everything is even."""
    stands_for_all = mask == Mask() and len(set(layout.rows)) == 1
    plan = way.plan(silent(0, ranks), layout, mask)
    some = range(1 if stands_for_all and way.strategy in ("allgather", "mesh") else ranks)
    return [dry_run.sent(plan, shape, rank) for rank in some]


def counts_agree(way: Way, ranks: int, kind: str, mask: Mask, heads: tuple[int, int]) -> bool:
    """Whether a small step sends what the dry run says, on every rank."""

    def step(group: Group) -> bool:
        rows = TILE_ROWS if way.invariant else COUNTED_ROWS
        layout = LAYOUTS[kind](rows * ranks, ranks)
        q, k, v, dout = (
            torch.randn(1, rows, heads[n], COUNTED_D).to(torch.bfloat16) for n in (0, 1, 1, 0)
        )
        done = run_step(q, k, v, dout, way.plan(group, layout, mask))
        return done.sent == done.derived

    return all(simulate(ranks, step))


def summary(volumes: Sequence[Volume]) -> dict[str, float]:
    """Bytes of the mean and of the busiest rank."""
    both = [v.forward + v.backward for v in volumes]
    named = {"forward": [v.forward for v in volumes], "backward": [v.backward for v in volumes]}
    result = {}
    for name, counts in (named | {"step": both}).items():
        result[f"{name}_bytes"] = statistics.fmean(c.bytes for c in counts)
        result[f"{name}_busiest_bytes"] = max(c.bytes for c in counts)
        result[f"{name}_elements"] = statistics.fmean(c.elements for c in counts)
    return result
