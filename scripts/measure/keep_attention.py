"""Measures activation checkpointing with and without keeping attention: peak memory, time, bytes sent.

A stack of blocks (attention and an MLP) is trained for one step on zigzag shards, in fresh
processes: without checkpointing, with all of a block recomputed, and with `seqpar.keep_attention`. Peak is
the growth of the resident memory of the fullest rank over the step. Exits 1 if forward's messages are not
counted once with `keep_attention`, or not twice without. Linux with glibc only.

Example: python scripts/measure/keep_attention.py --length 8192 --ranks 2 4 --json checkpointing.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import Group, Layout, Mask
from seqpar.commands import progress
from seqpar.testing import PeakMemory, ProcessWorld

ATTENTIONS = {
    "ring": seqpar.RingAttention,
    "ulysses": seqpar.UlyssesAttention,
    "allgather": seqpar.AllGatherAttention,
}
MODES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "full": {},
    "keep attention": {"context_fn": seqpar.keep_attention},
}
MMAP_THRESHOLD_BYTES = 64 * 2**10
M_MMAP_THRESHOLD = -3  # of mallopt, see malloc.h


@dataclass(frozen=True)
class Setting:
    """The model and the sequence."""

    length: int = 8192
    layers: int = 4
    dim: int = 256
    heads: int = 8
    kv_heads: int = 2


@dataclass(frozen=True)
class Measured:
    """Of one rank and one step."""

    peak_bytes: int
    seconds: float
    forward_bytes: int
    backward_bytes: int


class Block(nn.Module):
    """Attention and an MLP, each added to its input."""

    def __init__(self, setting: Setting, attention: nn.Module) -> None:
        super().__init__()
        e, width = setting.dim, setting.dim // setting.heads
        self.width, self.attention = width, attention
        self.q, self.out = nn.Linear(e, e), nn.Linear(e, e)
        self.k, self.v = (nn.Linear(e, setting.kv_heads * width) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.LayerNorm(e), nn.Linear(e, 4 * e), nn.GELU(), nn.Linear(4 * e, e)
        )

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`x [b sl e]` of this rank's rows, after the block. All ranks must call."""
        q, k, v = (f(x).unflatten(2, (-1, self.width)) for f in (self.q, self.k, self.v))
        x = x + self.out(self.attention(q, k, v, layout).flatten(2))
        after: Tensor = x + self.mlp(x)
        return after


def step(group: Group, setting: Setting, strategy: str, mode: str) -> tuple[int, int]:
    """(forward's bytes, backward's) of a step on this rank's rows."""
    torch.manual_seed(0)
    attention = ATTENTIONS[strategy](group, mask=Mask(causal=True))
    blocks = nn.ModuleList(Block(setting, attention) for _ in range(setting.layers))
    layout = seqpar.zigzag(setting.length, group.size)
    x = torch.randn(1, layout.rows[group.rank], setting.dim)
    options, before = MODES[mode], group.traffic.total.bytes
    for block in blocks:
        run = (
            block if options is None else partial(checkpoint, block, use_reentrant=False, **options)
        )
        x = run(x, layout)
    forward = group.traffic.total.bytes - before
    x.square().mean().backward()
    return forward, group.traffic.total.bytes - before - forward


def measure(group: Group, setting: Setting, strategy: str, mode: str) -> Measured:
    """One step, after a short one that starts threads and makes kernels."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
    short = Setting(**(asdict(setting) | {"length": min(1024, setting.length)}))
    step(group, short, strategy, mode)
    start = time.perf_counter()
    with PeakMemory() as peak:
        forward, backward = step(group, setting, strategy, mode)
    return Measured(peak.bytes, time.perf_counter() - start, forward, backward)


def study(
    setting: Setting, ranks: Sequence[int], strategies: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for every strategy, number of ranks and mode, each in a fresh world."""
    jobs = [(name, size, mode) for name in strategies for size in ranks for mode in MODES]
    rows = []
    for name, size, mode in progress.track(
        jobs, "checkpointing", name=lambda job: f"{job[0]}, P={job[1]}, {job[2]}"
    ):
        with ProcessWorld(size) as world:
            found: list[Measured] = world.run(measure, setting, name, mode, timeout=600.0)
        rows.append(
            {
                "strategy": name, "ranks": size, "mode": mode,
                "peak_bytes": max(m.peak_bytes for m in found),
                "seconds": max(m.seconds for m in found),
                "forward_bytes": max(m.forward_bytes for m in found),
                "backward_bytes": max(m.backward_bytes for m in found),
            }
        )  # fmt: skip
    return rows


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where forward's messages are not counted as often as they should be."""
    wrong = []
    by_case = {(r["strategy"], r["ranks"], r["mode"]): r for r in rows}
    for (name, size, mode), row in by_case.items():
        plain = by_case[name, size, "none"]
        again = plain["forward_bytes"] if mode == "full" else 0
        if row["backward_bytes"] != plain["backward_bytes"] + again:
            wrong.append(f"{name}, P = {size}, {mode}: backward sent {row['backward_bytes']} bytes")
    return wrong


def show(rows: Sequence[dict[str, Any]], setting: Setting, console: Console) -> None:
    """Prints the table."""
    table = Table(title=f"one training step per rank, {setting}")
    for name in ("strategy", "P", "checkpointing", "peak MB", "s", "sent MB forward", "backward"):
        table.add_column(name, justify="left" if name in ("strategy", "checkpointing") else "right")
    for r in rows:
        table.add_row(
            r["strategy"], str(r["ranks"]), r["mode"], f"{r['peak_bytes'] / 1e6:.1f}",
            f"{r['seconds']:.2f}", f"{r['forward_bytes'] / 1e6:.2f}", f"{r['backward_bytes'] / 1e6:.2f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Parses arguments, measures, prints; fails when messages are not counted as they should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument(
        "--strategies", nargs="+", default=["ring", "ulysses"], choices=list(ATTENTIONS)
    )
    for name, default in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    setting = Setting(**{name: getattr(args, name) for name in asdict(Setting())})
    if min(*args.ranks, *asdict(setting).values()) < 1:
        parser.error("ranks, length, layers, dim and heads must be at least 1")
    if setting.dim % setting.heads or setting.heads % setting.kv_heads:
        parser.error("heads must divide dim, and kv-heads must divide heads")

    rows = study(setting, args.ranks, args.strategies)
    show(rows, setting, Console())
    found = failures(rows)
    if args.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        result = {"setting": asdict(setting), "rows": rows, "failures": found, "versions": versions}
        args.json.write_text(json.dumps(result, indent=1))
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
