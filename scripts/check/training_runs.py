"""Trains the model of byte_level.py in many ways and holds losses and gradient norms to one process.

Every way is a run under torchrun: strategies, dp x sp, FSDP, checkpointing, tiles, accumulation, and a
checkpoint of the most ranks that fewer resume. Fails when a loss or a norm is off by more than
`--tolerance` in float32. Runs are one after another, with one thread for each rank.

Example: python scripts/check/training_runs.py --ranks 1 2 3 4 --steps 30 --json training.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seqpar.commands import progress
from seqpar.commands.arguments import parser_of

TRAIN = Path(__file__).parents[1] / "train" / "byte_level.py"
RESUMED = "resumed"
Run = tuple[str, int, list[str]]  # (what is special, ranks, options of byte_level.py)


def launch(ranks: int, options: list[str], folder: Path) -> dict[str, Any]:
    """What byte_level.py writes with `--json`; its output is shown if it fails."""
    out = folder / "run.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [sys.executable, *torchrun, str(TRAIN), "--json", str(out), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise SystemExit(f"P={ranks} with {' '.join(options)} failed; its output is above")
    return dict(json.loads(out.read_text()))


def ways(ranks: list[int]) -> list[Run]:
    """Every way that these numbers of ranks allow; the first is one process with nothing special."""
    runs: list[Run] = [("", n, []) for n in sorted({1, *ranks})]
    most = max(ranks)
    for strategy in ("ulysses", "allgather", "mesh", "hybrid"):
        runs.append((strategy, most, ["--strategy", strategy]))
    runs.append(
        ("full checkpointing, tiles", most, ["--checkpointing", "full", "--loss-tile", "100"])
    )
    runs.append(("2 micro-batches", most, ["--accumulate", "2"]))
    runs.append(("FSDP", most, ["--fsdp"]))
    if most % 2 == 0:
        runs.append((f"dp 2 x sp {most // 2}", most, ["--dp", "2"]))
        runs.append((f"dp 2 x sp {most // 2}, FSDP", most, ["--dp", "2", "--fsdp"]))
    return runs


def difference(got: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


def study(
    ranks: list[int], steps: int, options: list[str], only: list[str] | None = None
) -> list[dict[str, Any]]:
    """A row for every way: how far its losses and gradient norms are from those of one process.

    Args:
        only: names of ways; one process is run anyway.
    """
    options = ["--steps", str(steps), *options]
    most = max(ranks)
    fewer = max((n for n in ranks if n < most), default=most)
    rows: list[dict[str, Any]] = []
    one: dict[str, Any] = {}
    first, *others = ways(ranks)
    todo = [first, *(way for way in others if only is None or way[0] in only)]
    resumes = only is None or RESUMED in only
    with (
        progress.steps("training", len(todo) + 2 * resumes, ticking=True) as runs,
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)

        def add(what: str, size: int, extra: list[str], first: int = 0) -> None:
            runs.begin(f"P={size} {what}".rstrip())
            run = launch(size, options + extra, folder)
            one.update(one or run)
            rows.append({
                "ranks": size, "what": what, "losses": run["losses"],
                "loss": difference(run["losses"], one["losses"]),
                "grad_norm": difference(run["grad_norms"], one["grad_norms"][first:]),
                "peak_bytes": run["peak_bytes"],
            })  # fmt: skip
            runs.done()

        for what, size, extra in todo:
            add(what, size, extra)
        if not resumes:
            return rows
        half = steps // 2
        saving = ["--checkpoint", str(folder / "checkpoint")]
        runs.begin(f"P={most} until step {half}")
        launch(most, [*options, *saving, "--steps", str(half)], folder)
        runs.done()
        what = f"{RESUMED} at step {half} of P={most}"
        add(what, fewer, [*saving, "--resume"], first=half)
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the rows as a table."""
    table = Table(title="largest relative difference from one process, float32")
    for column in ("P", "", "loss", "gradient norm", "first loss", "last loss"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            str(row["ranks"]), row["what"], f"{row['loss']:.1e}", f"{row['grad_norm']:.1e}",
            f"{row['losses'][0]:.6f}", f"{row['losses'][-1]:.6f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Runs every way, and fails when one is off."""
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=500, help="bytes of a sequence")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative, of each loss")
    parser.add_argument(
        "--only", nargs="+", metavar="WAY", help=f"beside one process, such as FSDP or {RESUMED}"
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    names = [RESUMED, *(what for what, *_ in ways(args.ranks) if what)]
    if unknown := set(args.only or ()) - set(names):
        parser.error(f"--only takes some of {names}, got {sorted(unknown)}")
    rows = study(args.ranks, args.steps, ["--length", str(args.length)], args.only)
    show(rows, Console(width=110))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    wrong = [r for r in rows if not max(r["loss"], r["grad_norm"]) < args.tolerance]
    if wrong:
        raise SystemExit("off: " + "; ".join(f"P={r['ranks']} {r['what']}" for r in wrong))


if __name__ == "__main__":
    main()
