"""Measures what besides attention fills memory: logits, MLPs, what blocks keep; saved alone and together.

A causal model with a large vocabulary is trained for one step on zigzag shards with ring attention, in
fresh processes. Peak is the growth of the resident memory of the fullest rank over the step; kept is
what is resident between forward and backward. On a CPU the host is the device: what moved to the host is
counted, and taken off what is kept. Exits 1 if ways differ in their gradients, or all savings together
hold more than none. Linux with glibc only.

Example: python scripts/measure/memory_parts.py --length 4096 --ranks 1 2 4 --json memory_parts.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import Group, Mask
from seqpar.commands import progress
from seqpar.testing import PeakMemory, ProcessWorld
from seqpar.testing.memory import give_back_freed

FREED_BYTES = 64 * 2**10
LEAST_BYTES = 4096  # that move: less than users want, since the model is small
MIB = 2**20
TOLERANCE = 1e-4  # relative, of the norm of the gradient in float32
WAYS: dict[str, tuple[str, ...]] = {
    "nothing saved": (),
    "loss in tiles": ("loss",),
    "MLPs in tiles": ("mlp",),
    "blocks recomputed but for attention": ("blocks",),
    "the same, on the host": ("blocks", "host"),
    "blocks recomputed, loss in tiles": ("blocks", "loss"),
    "blocks recomputed, loss and MLPs in tiles": ("blocks", "loss", "mlp"),
    "all together": ("blocks", "loss", "mlp", "host"),
}


@dataclass(frozen=True)
class Setting:
    """The model and the sequence."""

    length: int = 4096
    layers: int = 4
    dim: int = 256
    hidden: int = 2048
    heads: int = 4
    vocabulary: int = 16384
    tile: int = 256


@dataclass(frozen=True)
class Measured:
    """Of one rank and one step."""

    peak_bytes: int
    kept_bytes: int
    moved_bytes: int
    seconds: float
    norm: float


class Block(nn.Module):
    """Attention and an MLP, each added to its input."""

    def __init__(self, setting: Setting, attention: nn.Module) -> None:
        super().__init__()
        e, self.width, self.attention = setting.dim, setting.dim // setting.heads, attention
        self.norm, self.qkv, self.out = nn.RMSNorm(e), nn.Linear(e, 3 * e), nn.Linear(e, e)
        up, down = nn.Linear(e, setting.hidden), nn.Linear(setting.hidden, e)
        self.mlp = nn.Sequential(nn.RMSNorm(e), up, nn.GELU(), down)

    def forward(self, x: Tensor, layout: seqpar.Layout) -> Tensor:
        """`x [b sl e]` of this rank's rows, after the block. All ranks must call."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, -1, self.width)).unbind(2)
        x = x + self.out(self.attention(q, k, v, layout).flatten(2))
        after: Tensor = x + self.mlp(x)
        return after


class Model(nn.Module):
    """An embedding, blocks, and the embedding once more as the head."""

    def __init__(self, setting: Setting, group: Group) -> None:
        super().__init__()
        attention = seqpar.RingAttention(group, mask=Mask(causal=True))
        self.embedding = nn.Embedding(setting.vocabulary, setting.dim)
        self.blocks = nn.ModuleList(Block(setting, attention) for _ in range(setting.layers))

    def losses(
        self, batch: dict[str, Any], layout: seqpar.Layout, parts: Sequence[str], tile: int
    ) -> tuple[Tensor, int]:
        """(the loss of each row `[b sl]`, bytes that blocks moved to the host)."""
        x, weight, labels = (
            self.embedding(batch["input_ids"]),
            self.embedding.weight,
            batch["labels"],
        )
        keeps = {"use_reentrant": False, "context_fn": seqpar.keep_attention}
        with ExitStack() as stack:
            memory = None
            if "host" in parts:
                memory = stack.enter_context(seqpar.saved_on_host(least_bytes=LEAST_BYTES))
            for block in self.blocks:
                run = partial(checkpoint, block, **keeps) if "blocks" in parts else block
                x = run(x, layout)
        moved, x = memory.bytes if memory else 0, x * weight.shape[1] ** -0.5
        if "loss" in parts:
            return seqpar.tiled_loss(x, weight, labels, tile=tile), moved
        logits = F.linear(x, weight).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape), moved


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def step(group: Group, setting: Setting, parts: Sequence[str]) -> tuple[int, int, float]:
    """(bytes that forward keeps, bytes moved, norm of the gradient) of a step on this rank's rows."""
    torch.manual_seed(0)
    model, ids = Model(setting, group), torch.randint(0, setting.vocabulary, (1, setting.length))
    batch, layout = seqpar.shard_batch({"input_ids": ids, "labels": ids}, group)
    before = resident_bytes()
    with ExitStack() as stack:
        if "mlp" in parts:
            stack.enter_context(seqpar.tiled_mlps(model, tile=setting.tile))
        losses, moved = model.losses(batch, layout, parts, setting.tile)
        kept = resident_bytes() - before - moved
        seqpar.mean_loss(losses, group, valid=batch["labels"] != -100).backward()
    seqpar.sum_gradients(model, group)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return kept, moved, float(norm)


def measure(group: Group, setting: Setting, parts: Sequence[str]) -> Measured:
    """One step, after a short one that starts threads and makes kernels."""
    give_back_freed(FREED_BYTES)
    short = min(64 * group.size, setting.length)
    step(group, Setting(**(asdict(setting) | {"length": short})), parts)
    start = time.perf_counter()
    with PeakMemory() as peak:
        kept, moved, norm = step(group, setting, parts)
    return Measured(peak.bytes, kept, moved, time.perf_counter() - start, norm)


def study(setting: Setting, ranks: Sequence[int], ways: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every number of ranks and way, each in a fresh world."""
    jobs = [(size, way) for size in ranks for way in ways]
    rows = []
    for size, way in progress.track(jobs, "memory", name=lambda job: f"P={job[0]}, {job[1]}"):
        with ProcessWorld(size) as world:
            found: list[Measured] = world.run(measure, setting, WAYS[way], timeout=900.0)
        fullest = max(found, key=lambda m: m.peak_bytes)
        seconds = max(m.seconds for m in found)
        rows.append({"ranks": size, "way": way} | asdict(fullest) | {"seconds": seconds})
    return rows


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where gradients differ, or savings save nothing."""
    wrong, norm = [], rows[0]["norm"]
    peaks = {(r["ranks"], r["way"]): r["peak_bytes"] for r in rows}
    for r in rows:
        if abs(r["norm"] - norm) > TOLERANCE * norm:
            wrong.append(
                f"P = {r['ranks']}, {r['way']}: the gradient's norm is {r['norm']}, not {norm}"
            )
    first, *_, last = WAYS
    for size in dict.fromkeys(r["ranks"] for r in rows):
        if peaks.get((size, last), 0) > peaks.get((size, first), float("inf")):
            wrong.append(f"P = {size}: all together hold more than nothing saved")
    return wrong


def show(rows: Sequence[dict[str, Any]], setting: Setting, console: Console) -> None:
    """Prints the table."""
    table = Table(title=f"one training step per rank, {setting}")
    for name in ("P", "way", "peak MiB", "kept MiB", "moved MiB", "s"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for r in rows:
        mib = (f"{r[name] / MIB:.0f}" for name in ("peak_bytes", "kept_bytes", "moved_bytes"))
        table.add_row(str(r["ranks"]), r["way"], *mib, f"{r['seconds']:.1f}")
    console.print(table)


def main() -> None:
    """Parses arguments, measures, prints; fails when gradients differ or savings save nothing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    for name, default in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    setting = Setting(**{name: getattr(args, name) for name in asdict(Setting())})
    if min(*args.ranks, *asdict(setting).values()) < 1 or setting.dim % setting.heads:
        parser.error("all numbers must be at least 1, and heads must divide dim")
    rows = study(setting, args.ranks, args.ways)
    show(rows, setting, Console(width=120))
    found = failures(rows)
    if args.json:
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        result = {"setting": asdict(setting), "rows": rows, "failures": found, "versions": versions}
        args.json.write_text(json.dumps(result, indent=1))
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
