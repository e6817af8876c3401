"""Finds the longest sequence that byte_level.py trains on within a memory limit, for several P.

Two steps (from the second on the optimizer has state) are run in fresh processes at some lengths and
their peak taken: all that is resident in a process, with code and libraries, of the rank that holds
most. A line through the peaks says how long a sequence should fit; that length is then run, and a
shorter one if it does not fit. What is called the longest has been run within the limit.

By default the model is one block 2048 wide: rows are large, so that the lengths that fill the memory
are short enough for a CPU (attention takes time by the square of the length, memory by the length).
The block is recomputed and the loss computed in tiles. glibc is told to give back freed memory of
64 KiB and more, as it would for the larger tensors of longer sequences. Linux only.

Example: python scripts/measure/longest_context.py --memory-mib 2048 --ranks 1 2 4 --plot longest.png
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seqpar.commands import progress

TRAIN = Path(__file__).parents[1] / "train" / "byte_level.py"
MIB = 2**20
MODEL = ["--dim", "2048", "--layers", "1", "--heads", "16", "--kv-heads", "4", "--batch", "1"]
LEAN = ["--checkpointing", "full", "--loss-tile", "1024"]
SHARE_FOR_ERRORS = 0.005  # of the limit, which a first guess leaves free
ATTEMPTS = 5  # to find a length that fits


def train(length: int, ranks: int, options: Sequence[str]) -> dict[str, float]:
    """Peak bytes of the rank that holds most over two steps, and seconds of the second."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "metrics.jsonl"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        script = [str(TRAIN), "--length", str(length), "--steps", "2", "--metrics", str(out)]
        script += ["--max-bytes", str(max(2_000_000, 2 * length)), *options]
        environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(
            [sys.executable, *torchrun, *script],
            env=os.environ | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.stderr.write(done.stdout + done.stderr)
            raise SystemExit(f"P={ranks} failed at length {length}; its output is above")
        record = json.loads(out.read_text().splitlines()[-1])
    return {"length": length, "peak_bytes": record["peak_bytes"], "seconds": record["seconds"]}


def line(points: Sequence[dict[str, float]]) -> tuple[float, float]:
    """(bytes at length 0, bytes of a position): through the two longest points."""
    (a, b) = sorted(points, key=lambda point: point["length"])[-2:]
    slope = (b["peak_bytes"] - a["peak_bytes"]) / (b["length"] - a["length"])
    return b["peak_bytes"] - slope * b["length"], slope


def longest(
    measure: Callable[[int], dict[str, float]], lengths: Sequence[int], limit: float, multiple: int
) -> dict[str, Any]:
    """The longest length, a multiple of `multiple`, that ran within the limit, and all points.

    Raises:
        ValueError: memory does not grow with the length, or no length fits.
    """
    points = [measure(length) for length in lengths]
    for attempt in range(ATTEMPTS):
        start, slope = line(points)
        if slope <= 0:
            raise ValueError(f"memory must grow with the length, got {points}")
        aim = limit * (1 - SHARE_FOR_ERRORS * (1 + attempt))
        length = int((aim - start) / slope) // multiple * multiple
        if length < 2:
            break
        points.append(measure(length))
        if points[-1]["peak_bytes"] <= limit:
            fits = [point for point in points if point["peak_bytes"] <= limit]
            best = max(fits, key=lambda point: point["length"])
            return {"points": points, "longest": best, "line": [start, slope]}
    raise ValueError(f"no length fits {limit / MIB:.0f} MiB, got {points}")


def study(args: argparse.Namespace, options: list[str]) -> list[dict[str, Any]]:
    """A row for each number of ranks."""
    rows = []
    with progress.steps("longest context", len(args.ranks)) as worlds:
        for ranks in args.ranks:

            def measure(length: int, ranks: int = ranks) -> dict[str, float]:
                worlds.begin(f"P={ranks}, length {length}")
                started = time.perf_counter()
                point = train(length, ranks, options)
                point["run_seconds"] = time.perf_counter() - started
                worlds.say(f"P={ranks}: {json.dumps(point)}")
                return point

            lengths = [n * ranks for n in args.lengths]
            multiple = args.multiple_of * ranks
            found = longest(measure, lengths, args.memory_mib * MIB, multiple)
            rows.append({"ranks": ranks} | found)
            worlds.done()
    first = rows[0]["longest"]["length"]
    for row in rows:
        row["times"] = row["longest"]["length"] / first
    return rows


def show(rows: list[dict[str, Any]], memory_mib: float, console: Console) -> None:
    """Prints a line for each number of ranks."""
    table = Table(title=f"longest sequence within {memory_mib:g} MiB per rank, run")
    for column in (
        "P",
        "length",
        f"times P={rows[0]['ranks']}",
        "peak MiB",
        "KiB / position",
        "s",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        best = row["longest"]
        table.add_row(
            str(row["ranks"]), f"{best['length']:,}", f"{row['times']:.2f}",
            f"{best['peak_bytes'] / MIB:.0f}", f"{row['line'][1] / 1024:.1f}", f"{best['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)


def plot(rows: list[dict[str, Any]], memory_mib: float, path: Path) -> None:
    """Draws peaks against the length, and the longest length against P, into an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colours = ["#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7"]
    for row, colour in zip(rows, colours, strict=False):
        start, slope = row["line"]
        best = row["longest"]["length"]
        left.plot([0, best], [start / MIB, (start + slope * best) / MIB], "-", color=colour, lw=1)
        points = [(p["length"], p["peak_bytes"] / MIB) for p in row["points"]]
        left.plot(*zip(*points, strict=True), "o", color=colour, label=f"P = {row['ranks']}")
    left.axhline(memory_mib, color="#777777", ls="--", label=f"limit, {memory_mib:g} MiB")
    left.set(xlabel="length", ylabel="peak MiB of a rank", xlim=(0, None), ylim=(0, None))
    left.set_title("memory of a training step")
    left.legend()
    ranks = [row["ranks"] for row in rows]
    lengths = [row["longest"]["length"] for row in rows]
    ideal = [lengths[0] * n / ranks[0] for n in ranks]
    right.plot(ranks, ideal, "--", color="#777777", label="in proportion to P")
    right.plot(ranks, lengths, "o-", color="#0072B2", label="run within the limit")
    for row, n, length in zip(rows, ranks, lengths, strict=True):
        right.annotate(
            f"{length:,} ({row['times']:.2f}x)", (n, length), (6, -14), textcoords="offset points"
        )
    right.set(xlabel="P", ylabel="longest length", xticks=ranks, ylim=(0, None))
    right.set_xlim(min(ranks) - 0.3, max(ranks) + 1.3)
    right.set_title("longest sequence that is trained")
    right.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Finds, shows, writes and draws; fails when P ranks reach too little of P times the length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory-mib", type=float, default=2048, help="of a rank, all included")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 3072], help="times P")
    parser.add_argument("--multiple-of", type=int, default=64, help="of lengths, times P")
    parser.add_argument(
        "--least", type=float, default=0.9, help="share of P times the first length"
    )
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--plot", type=Path, help="an image file")
    parser.add_argument("options", nargs="*", help="others of byte_level.py, after --")
    args = parser.parse_args()
    options = [*MODEL, *LEAN, *args.options]
    rows = study(args, options)
    show(rows, args.memory_mib, Console(width=110))
    if args.json:
        record = {"memory_mib": args.memory_mib, "options": options, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1))
    if args.plot:
        plot(rows, args.memory_mib, args.plot)
    first = rows[0]["ranks"]
    short = [r["ranks"] for r in rows if r["times"] < args.least * r["ranks"] / first]
    if short:
        raise SystemExit(f"less than {args.least:.0%} of the length in proportion at P in {short}")


if __name__ == "__main__":
    main()
