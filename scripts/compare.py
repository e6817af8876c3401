"""Compares strategies with one process: time, bytes against the formula, peak memory, in one run.

P ranks with one thread each against one process with `--threads` threads that runs torch's own
scaled_dot_product_attention on the whole sequence. Rounds alternate between the two, so that what
else the machine does hits both alike; the ratio is between medians of rounds.

Example: python scripts/compare.py --length 8192 --ranks 2 --dtype float32 bfloat16
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import progress
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from seqpar import Group, Mask, Plan
from seqpar.layout import LAYOUTS, Layout
from seqpar.strategies import GRID_STRATEGIES, Volume
from seqpar.testing import PeakMemory, ProcessWorld, run_step

CONTENDERS = {  # strategy -> the layout it likes best
    "ring": "zigzag", "ulysses": "contiguous", "allgather": "zigzag", "mesh": "striped",
    "hybrid": "zigzag", "materialised_rows": "zigzag",
}  # fmt: skip


def one_device_step(_: Group, setting: dict[str, Any]) -> float:
    """Seconds of forward and backward on the whole sequence, with torch's own attention."""
    length, heads, d, dtype = (setting[k] for k in ("length", "heads", "d", "dtype"))
    q, k, v, dout = (torch.randn(1, heads, length, d, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    start = time.perf_counter()
    out = F.scaled_dot_product_attention(*leaves, is_causal=setting["causal"])
    torch.autograd.grad(out, leaves, dout)
    return time.perf_counter() - start


def rank_tensors(layout: Layout, rank: int, setting: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout of this rank's rows."""
    shape = 1, layout.rows[rank], setting["heads"], setting["d"]
    return tuple(torch.randn(shape, dtype=setting["dtype"]) for _ in range(4))


def make_plan(group: Group, setting: dict[str, Any], strategy: str) -> Plan:
    """The plan of a contender."""
    layout = LAYOUTS[setting["layouts"][strategy]](setting["length"], group.size)
    grid = None
    if strategy in GRID_STRATEGIES:  # as square as can be
        divisors = [n for n in range(1, group.size + 1) if group.size % n == 0]
        grid = group.grid(ulysses=divisors[(len(divisors) - 1) // 2])
    return Plan(group, layout, Mask(causal=setting["causal"]), strategy=strategy, grid=grid)


def rank_step(group: Group, setting: dict[str, Any], strategy: str) -> tuple[float, Volume, Volume]:
    """Seconds of forward and backward on this rank, what it sent, and what the formula says."""
    plan = make_plan(group, setting, strategy)
    step = run_step(*rank_tensors(plan.layout, group.rank, setting), plan)
    return step.seconds, step.sent, step.formula


def rank_memory(group: Group, setting: dict[str, Any], strategy: str) -> int:
    """Peak growth in bytes over one step, the rank's own q, k, v, dout and gradients included."""
    rank_step(group, setting | {"length": 8 * group.size}, strategy)  # threads, buffers of gloo
    with PeakMemory() as peak:
        rank_step(group, setting, strategy)
    return peak.bytes


def one_device_memory(group: Group, setting: dict[str, Any]) -> int:
    """Peak growth in bytes of one process that attends the whole sequence."""
    one_device_step(group, setting | {"length": 16})
    with PeakMemory() as peak:
        one_device_step(group, setting)
    return peak.bytes


def compare(setting: dict[str, Any], ranks: int, threads: int, rounds: int) -> dict[str, Any]:
    """Times of alternating rounds, counted and computed bytes, and peak memory in fresh processes."""
    contenders = list(setting["layouts"])
    times: dict[str, list[float]] = {name: [] for name in ("one device", *contenders)}
    volumes: dict[str, list[tuple[Volume, Volume]]] = {}
    label = f"N={setting['length']} {setting['dtype']}"
    with ProcessWorld(1, num_threads=threads) as one, ProcessWorld(ranks) as many:
        for n in progress.track(range(rounds + 1), f"rounds, {label}"):
            seconds = {"one device": one.run(one_device_step, setting)[0]}
            for name in contenders:
                steps = many.run(rank_step, setting, name)
                seconds[name] = max(step[0] for step in steps)
                volumes[name] = [step[1:] for step in steps]
            if n > 0:  # the first round warms up
                for name, value in seconds.items():
                    times[name].append(value)
    rows = []
    for name in times:
        if name == "one device":
            with ProcessWorld(1, num_threads=threads) as world:
                peak = world.run(one_device_memory, setting)[0]
            sent = formula = 0
        else:
            with ProcessWorld(ranks) as world:
                peak = max(world.run(rank_memory, setting, name))
            sent = sum(v.forward.bytes + v.backward.bytes for v, _ in volumes[name])
            formula = sum(v.forward.bytes + v.backward.bytes for _, v in volumes[name])
        median = statistics.median(times[name])
        ratios = [a / b for a, b in zip(times[name], times["one device"], strict=True)]
        rows.append(
            {
                "name": name,
                "layout": setting["layouts"].get(name, ""),
                "median_seconds": median,
                "ratio": statistics.median(ratios),
                "ratio_of_best": min(times[name]) / min(times["one device"]),
                "sent_bytes": sent,
                "formula_bytes": formula,
                "peak_bytes": peak,
                "seconds": times[name],
            }
        )
    return {
        "length": setting["length"], "dtype": str(setting["dtype"]).removeprefix("torch."),
        "causal": setting["causal"], "heads": setting["heads"], "d": setting["d"],
        "ranks": ranks, "threads_of_one_device": threads, "rounds": rounds, "rows": rows,
    }  # fmt: skip


def show(result: dict[str, Any], console: Console) -> None:
    """Prints a result as a table."""
    mask = "causal" if result["causal"] else "full"
    table = Table(
        title=f"N={result['length']} {result['dtype']} {mask}, {result['heads']} heads of "
        f"{result['d']}, P={result['ranks']}, forward + backward, median of {result['rounds']}"
    )
    for column in ("", "layout", "ms", "ratio", "sent MB", "formula MB", "peak MB / rank"):
        table.add_column(column, justify="left" if column in ("", "layout") else "right")
    for row in result["rows"]:
        table.add_row(
            row["name"], row["layout"], f"{1e3 * row['median_seconds']:.1f}", f"{row['ratio']:.3f}",
            f"{row['sent_bytes'] / 1e6:.3f}", f"{row['formula_bytes'] / 1e6:.3f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Parses arguments, compares, prints; fails when counted bytes differ from the formula."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, nargs="+", default=[2048, 8192], help="tokens")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the one process")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--d", type=int, default=64, help="width of a head")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--full", action="store_true", help="no causal mask")
    parser.add_argument("--strategies", nargs="+", choices=CONTENDERS, default=["ring", "ulysses"])
    parser.add_argument("--ring-layout", choices=LAYOUTS, default=CONTENDERS["ring"])
    parser.add_argument("--ulysses-layout", choices=LAYOUTS, default=CONTENDERS["ulysses"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()

    layouts = CONTENDERS | {"ring": args.ring_layout, "ulysses": args.ulysses_layout}
    console = Console()
    results = []
    for length in args.length:
        for dtype in args.dtype:
            setting = {
                "length": length, "heads": args.heads, "d": args.d,
                "dtype": getattr(torch, dtype), "causal": not args.full,
                "layouts": {name: layouts[name] for name in args.strategies},
            }  # fmt: skip
            results.append(compare(setting, args.ranks, args.threads, args.rounds))
            show(results[-1], console)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    off = [
        f"{row['name']} at N={r['length']} {r['dtype']}"
        for r in results
        for row in r["rows"]
        if row["sent_bytes"] != row["formula_bytes"]
    ]
    if off:
        raise SystemExit(f"counted bytes differ from the formula: {', '.join(off)}")


if __name__ == "__main__":
    main()
