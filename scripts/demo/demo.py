"""The main job on real text: Ring and Ulysses for P = 1 ... 4, held to one device, side by side.

For each number of ranks and each strategy, under torchrun: largest errors against float64, bytes
counted and by a dry run, time, what a training step holds at its peak, and a small language model
trained on the text.
Writes report/index.html and report/report.json, and fails when anything does not agree.

Example: bash scripts/demo.sh --text my_novel.txt
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from demo_page.page import write_page
from rich.console import Console
from rich.table import Table

import seqpar
from seqpar.commands import progress
from seqpar.commands.arguments import parser_of
from seqpar.testing import NAMES

RANK = Path(__file__).with_name("demo_rank.py")
TOLERATED_LOSS_DIFFERENCE = 1e-5  # relative, float32, over the first steps
FIRST_STEPS = 20


def launch(ranks: int, options: list[str]) -> dict[str, Any]:
    """The records of one run of demo_rank.py under torchrun, by strategy."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        script = [str(RANK), "--json", str(record), *options]
        done = subprocess.run(
            [sys.executable, *torchrun, *script],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.stderr.write(done.stdout + done.stderr)
            raise SystemExit(f"P={ranks} failed; its output is above")
        return dict(json.loads(record.read_text()))


def loss_difference(run: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest relative difference of the first losses."""
    pairs = list(zip(run["losses"], reference["losses"], strict=True))[:FIRST_STEPS]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def problems(runs: list[dict[str, Any]], one_device: dict[str, Any]) -> list[str]:
    """What does not agree, in words."""
    found = []
    for run in runs:
        label = f"{run['strategy']} at P={run['ranks']}"
        if run["sent_bytes"] != run["derived_bytes"]:
            found.append(f"{label}: sent {run['sent_bytes']}, by a dry run {run['derived_bytes']}")
        for dtype, e in run["equality"].items():
            found += [
                f"{label}: {name} in {dtype} off by {e['errors'][name]:.3g}, allowed {e['allowed'][name]:.3g}"
                for name in NAMES
                if not e["errors"][name] <= e["allowed"][name]
            ]
        if not run["loss_difference"] < TOLERATED_LOSS_DIFFERENCE:
            found.append(f"{label}: losses differ from P=1 by {run['loss_difference']:.3g}")
        for name in ("loss", "gradient_norm"):
            got, expected = run["step"][name], one_device["step"][name]
            if not abs(got - expected) / expected < TOLERATED_LOSS_DIFFERENCE:
                found.append(f"{label}: {name} of the long step is {got}, on one device {expected}")
    return found


def show(report: dict[str, Any], console: Console) -> None:
    """Prints the side-by-side table."""
    table = Table(
        title=f"causal attention over {report['length']} tokens of text, forward + backward"
    )
    for column in (
        "",
        "P",
        "float64 error",
        "float32 error",
        "sent MB",
        "dry-run MB",
        "step MB/rank",
        "ms",
        "loss diff.",
    ):
        table.add_column(column, justify="left" if not column else "right")
    one = report["one_device"]
    table.add_row(
        "one device",
        "",
        "",
        "",
        "",
        "",
        f"{one['step']['peak_bytes'] / 1e6:.1f}",
        f"{1e3 * one['seconds']:.0f}",
        "",
    )
    for run in report["runs"]:
        worst = {d: max(e["errors"].values()) for d, e in run["equality"].items()}
        table.add_row(
            run["strategy"], str(run["ranks"]), f"{worst['float64']:.1e}", f"{worst['float32']:.1e}",
            f"{sum(run['sent_bytes']) / 1e6:.3f}", f"{sum(run['derived_bytes']) / 1e6:.3f}",
            f"{run['step']['peak_bytes'] / 1e6:.1f}", f"{1e3 * run['seconds']:.0f}",
            f"{run['loss_difference']:.1e}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Runs everything, writes the report, fails when something does not agree."""
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], help="1 comes first")
    parser.add_argument("--long", type=int, default=8192, help="tokens to time and hold")
    parser.add_argument("--steps", type=int, default=24, help="of training")
    parser.add_argument("--text", type=Path, help="a file instead of Python's sources")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument("--json", type=Path, help="where to write report.json; by default in --out")
    args = parser.parse_args()
    if args.ranks[0] != 1:
        parser.error("the first of --ranks must be 1: the others are compared with it")
    started = time.monotonic()
    options = ["--long", str(args.long), "--steps", str(args.steps)]
    options += ["--text", str(args.text.resolve())] if args.text else []

    records: dict[str, Any] = {}
    runs = []
    for ranks in progress.track(
        args.ranks, "demo", name=lambda p: f"ring and ulysses, P={p}", ticking=True
    ):
        records = launch(ranks, options) | records
        runs += [records.pop(strategy) for strategy in ("ring", "ulysses")]
    for run in runs:
        run["loss_difference"] = loss_difference(run, runs[0])
    report = {
        "length": args.long,
        "text": args.text.name if args.text else "the source of Python's standard library",
        "machine": {
            "cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system(),
            "python": platform.python_version(), "torch": torch.__version__, "seqpar": seqpar.__version__,
        },
        "one_device": records["one device"],
        "runs": runs,
        "problems": problems(runs, records["one device"]),
        "seconds": time.monotonic() - started,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.json or args.out / "report.json").write_text(json.dumps(report, indent=1))
    write_page(report, args.out / "index.html")
    show(report, Console(width=130))
    print(f"{args.out / 'index.html'} written after {report['seconds']:.0f} s")
    if report["problems"]:
        raise SystemExit("does not agree:\n" + "\n".join(report["problems"]))


if __name__ == "__main__":
    main()
