"""Compares the peak memory of a rank with a dry run of its plan; exits 1 if they differ by > 5 %.

Forward and backward of causal attention over zigzag shards. Measured is the growth of the resident
memory of each process at its peak, in fresh processes and after a shorter step that starts threads
and connections and makes kernels, with dout made between forward and backward. Freed tensors go
back to the system at once (see peak_memory.py), so what is measured is what tensors need, plus
what Python and torch touch for the first time. `--exact` takes the profiler's record of allocations
instead: the same on every run. A receive buffer takes no memory before its message comes, so where
ranks wait for each other a peak may be lower than it says: the highest of `--repeats` counts.
The rank whose measured peak is furthest from it is shown. Linux with glibc only.

Example: python scripts/measure/activation_memory.py --lengths 16384 --ranks 2 4 --json memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from seqpar import Group, Mask, Plan, attention
from seqpar.calls import Shape, dry_run, resolve
from seqpar.calls.dry_run import Held
from seqpar.commands import progress
from seqpar.layout import LAYOUTS, Layout
from seqpar.testing import PeakMemory, ProcessWorld
from seqpar_kernels.torch_internals import allocated

STRATEGIES = ("ring", "ulysses", "allgather", "mesh", "hybrid")
TOLERANCE = 0.05
# Of a rank: tiles of every size the op has, for which oneDNN makes code. In bfloat16 that took 4 to 11 MB,
# which a warm-up of 8 rows left to the measured step; in float32 under 1 MB.
WARM_UP_ROWS = 1024
MMAP_THRESHOLD_BYTES = 64 * 2**10
M_MMAP_THRESHOLD = -3  # of mallopt, see malloc.h


@dataclass(frozen=True)
class Setting:
    """The tensors of a step: few heads, because memory is studied and not speed."""

    strategy: str = "ring"
    length: int = 16384
    layout: str = "zigzag"
    heads: int = 4
    kv_heads: int = 4
    d: int = 32
    vd: int = 32
    batch: int = 1
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    implementation: Any = None
    invariant: bool | None = None
    head_chunks: int = 1

    def plan(self, group: Group) -> Plan:
        """With its implementation not resolved. Grids have two ulysses ranks, or columns."""
        grid = group.grid(ulysses=2) if self.strategy in ("mesh", "hybrid") else None
        return Plan(
            group, _layout(self.layout, self.length, group.size), _mask(self.causal, self.window),
            strategy=self.strategy, grid=grid, implementation=self.implementation,  # type: ignore[arg-type]
            invariant=self.invariant, head_chunks=self.head_chunks,
        )  # fmt: skip

    @property
    def shape(self) -> Shape:
        """Of the call."""
        dtype = getattr(torch, self.dtype)
        return Shape(self.batch, self.heads, self.kv_heads, self.d, self.vd, dtype)


@dataclass(frozen=True)
class Allocated:
    """Bytes of tensors: at the peak of forward, between, and at the peak of backward."""

    forward: int
    kept: int
    backward: int


def step(group: Group, setting: Setting) -> None:
    """Forward and backward on this rank's rows of random tensors."""
    plan, dtype = setting.plan(group), getattr(torch, setting.dtype)
    rows, b = plan.layout.rows[group.rank], setting.batch
    hq, hkv, d, vd = setting.heads, setting.kv_heads, setting.d, setting.vd
    with record_function("forward"):
        q, k, v = (
            torch.randn(b, rows, h, w, dtype=dtype, requires_grad=True)
            for h, w in ((hq, d), (hkv, d), (hkv, vd))
        )
        out = attention(q, k, v, plan)
    with record_function("backward"):
        torch.autograd.grad(out, (q, k, v), torch.randn(b, rows, hq, vd, dtype=dtype))


@cache
def _layout(kind: str, length: int, size: int) -> Layout:
    """The layout, made once: it has a small tensor too."""
    return LAYOUTS[kind](length, size)


@cache
def _mask(causal: bool, window: int | None) -> Mask:
    """The mask, made once: it has a small tensor, which is no activation."""
    return Mask(causal, window)


def derived(group: Group, setting: Setting) -> Held:
    """What a dry run of this rank says."""
    plan, shape = setting.plan(group), setting.shape
    q, v = (torch.empty(0, 0, 0, w, dtype=shape.dtype) for w in (shape.d, shape.vd))
    return dry_run.held(resolve(plan, q, v), shape, group.rank)


def resident_bytes(group: Group, setting: Setting) -> int:
    """Peak growth of this process over one step."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    step(group, replace(setting, length=min(WARM_UP_ROWS * group.size, setting.length)))
    with PeakMemory() as peak:
        step(group, setting)
    return peak.bytes


def allocated_bytes(group: Group, setting: Setting) -> Allocated:
    """From the profiler's record of what was allocated on CPU and freed."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        step(group, setting)
    now, peaks, kept = 0, {"forward": 0, "backward": 0}, 0
    for phase, size in allocated(profiled):
        now += size
        if phase in peaks:
            peaks[phase] = max(peaks[phase], now)
        if phase == "forward":
            kept = now
    return Allocated(peaks["forward"], kept, peaks["backward"])


def compare(setting: Setting, ranks: int, *, exact: bool, repeats: int) -> dict[str, Any]:
    """Dry run and measurement of the rank for which they differ most, in fresh processes."""
    measured = [0] * ranks
    for _ in range(1 if exact else repeats):
        with ProcessWorld(ranks) as world:
            dry_runs: list[Held] = world.run(derived, setting)
            if exact:
                found = world.run(allocated_bytes, setting, timeout=600.0)
                peaks = [max(x.forward, x.backward) for x in found]
            else:
                peaks = world.run(resident_bytes, setting, timeout=600.0)
        measured = [max(pair) for pair in zip(measured, peaks, strict=True)]
    ratios = [m / d.peak for m, d in zip(measured, dry_runs, strict=True)]
    worst = max(range(ranks), key=lambda rank: abs(ratios[rank] - 1))
    return {
        "strategy": setting.strategy, "ranks": ranks, "length": setting.length,
        "dtype": setting.dtype, "rank": worst, "derived_bytes": dry_runs[worst].peak,
        "measured_bytes": measured[worst], "ratio": ratios[worst], "ratios": ratios,
        "kept_bytes": dry_runs[worst].kept,
    }  # fmt: skip


def study(
    strategies: Sequence[str],
    lengths: Sequence[int],
    ranks: Sequence[int],
    setting: Setting,
    *,
    exact: bool = False,
    repeats: int = 3,
) -> list[dict[str, Any]]:
    """A row for every strategy, number of ranks and length. Grids are 2 x P/2 and take an even P > 2."""
    jobs = [
        (replace(setting, strategy=name, length=length), p)
        for length in lengths
        for p in ranks
        for name in strategies
        if name not in ("mesh", "hybrid") or (p > 2 and p % 2 == 0)
    ]
    tracked = progress.track(
        jobs, "peak memory", name=lambda j: f"{j[0].strategy}, P={j[1]}, N={j[0].length}"
    )
    return [compare(job, p, exact=exact, repeats=repeats) for job, p in tracked]


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows in which dry run and measurement differ too much."""
    return [
        f"{row['strategy']}, P = {row['ranks']}, N = {row['length']}: measured {row['ratio']:.3f} of "
        f"the dry run on rank {row['rank']}"
        for row in rows
        if abs(row["ratio"] - 1) > TOLERANCE
    ]


def show(rows: Sequence[dict[str, Any]], setting: Setting, console: Console) -> None:
    """Prints the table."""
    table = Table(
        title=f"peak of a step per rank, causal {setting.layout}, {setting.dtype}, {setting.heads} "
        f"heads of {setting.d}, {setting.kv_heads} of keys"
    )
    table.add_column("strategy")
    for name in ("P", "N", "derived MB", "measured MB", "ratio", "rank"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["strategy"], str(row["ranks"]), str(row["length"]),
            f"{row['derived_bytes'] / 1e6:.1f}", f"{row['measured_bytes'] / 1e6:.1f}",
            f"{row['ratio']:.3f}", str(row["rank"]),
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Parses arguments, measures, prints; fails when a ratio is off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=None, help="as many as --heads")
    parser.add_argument("--d", type=int, default=32, help="width of a head")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--layout", default="zigzag", choices=list(LAYOUTS))
    parser.add_argument("--repeats", type=int, default=3, help="of which the highest peak counts")
    parser.add_argument("--exact", action="store_true", help="the profiler's record of allocations")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    if min(*args.lengths, *args.ranks, args.heads, kv_heads, args.d, args.repeats) < 1:
        parser.error("lengths, ranks, heads, d and repeats must be at least 1")

    setting = Setting(
        layout=args.layout, heads=args.heads, kv_heads=kv_heads, d=args.d, vd=args.d,
        dtype=args.dtype,
    )  # fmt: skip
    rows = study(
        args.strategies, args.lengths, args.ranks, setting, exact=args.exact, repeats=args.repeats
    )
    show(rows, setting, Console())
    found = failures(rows)
    if args.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        result = {
            "setting": asdict(setting),
            "exact": args.exact,
            "repeats": args.repeats,
            "rows": rows,
            "failures": found,
        }
        args.json.write_text(json.dumps(result | {"versions": versions}, indent=1))
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
