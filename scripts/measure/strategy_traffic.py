"""What every strategy sends: against the textbook volume, by grid, by number of ranks, with a window.

Four parts. `volumes`: bytes per rank of every strategy beside the volume of its textbook form, which
skips no hop and never lets queries travel. `grids`: every grid of the mesh against ring and all-gather.
`least`: which strategy sends least. `windowed`: bytes and CPU time of a rank where rows see a window.

Bytes of `volumes`, `grids` and `least` follow from dry runs at `--length`; every row of
`volumes` is also counted in an in-process world at a small length with the same heads. `windowed` is
counted and timed: CPU seconds of the median rank's thread, waiting left out. A rank's bytes are those it
sends; sums and statistics are float32.

Example: python scripts/measure/strategy_traffic.py --heads 32 8 --ranks 4 16 --parts volumes grids
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sent_by_strategy.grids import grids
from sent_by_strategy.volumes import SETTINGS, least, volumes
from sent_by_strategy.windowed_ring import plot, windowed

from seqpar.calls import Shape
from seqpar.commands import progress

PARTS = ("volumes", "grids", "least", "windowed")


def failures(result: dict[str, Any]) -> list[str]:
    """What must not be, in words."""
    wrong = []
    for row in result.get("volumes", []):
        where = f"{row['name']}, {'causal' if row['causal'] else 'full'} {row['layout']}, P={row['ranks']}"
        if not row["counted_is_derived"]:
            wrong.append(f"{where}: counted bytes differ from the dry run")
        if row["strategy"] in ("ring", "ulysses") and "below" in row:
            for part in ("forward", "backward"):
                found, base = row[f"{part}_busiest_bytes"], row[f"textbook_{part}_bytes"]
                if found > base:
                    wrong.append(f"{where}: {part} {found:,.0f} bytes, the textbook {base:,.0f}")
    points = result.get("windowed", {}).get("points", [])
    wrong += [
        f"{p['name']}, P={p['ranks']}, N={p['length']}: counted bytes differ from the dry run"
        for p in points
        if not p["counted_is_derived"]
    ]
    steady = [
        p
        for p in points
        if p["series"].startswith("rows") and p["name"].startswith("windowed ring")
    ]
    inside = {
        p["busiest_bytes"] for p in steady if p["ranks"] > 2
    }  # of two ranks, both are at an end
    if len(inside) > 1 or len({p["busiest_scores"] for p in steady}) > 1:
        wrong.append(f"a windowed ring's bytes or scores per rank depend on P: {steady}")
    return wrong


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the parts as tables."""
    for mask, kind in SETTINGS:
        for heads in {tuple(row["heads"]): None for row in result.get("volumes", [])}:
            rows = [
                row for row in result["volumes"]
                if row["causal"] == mask.causal and row["layout"] == kind and tuple(row["heads"]) == heads
            ]  # fmt: skip
            label = f"{'causal' if mask.causal else 'full'} {kind}, heads {heads[0]}/{heads[1]}"
            table = _table(
                f"{label}, P={rows[0]['ranks']}, N={result['length']}, MB per rank",
                "", "forward", "backward", "busiest", "textbook", "below", "busiest below",
            )  # fmt: skip
            for row in rows:
                last = ["-"] * 3
                if "below" in row:
                    base = row["textbook_forward_bytes"] + row["textbook_backward_bytes"]
                    last = [_mb(base), f"{row['below']:.1%}", f"{row['busiest_below']:.1%}"]
                sent = (row[f"{n}_bytes"] for n in ("forward", "backward", "step_busiest"))
                table.add_row(row["name"], *map(_mb, sent), *last)
            console.print(table)
    for found in result.get("grids", []):
        table = _table(
            f"mesh, full, heads {found['heads'][0]}/{found['heads'][1]}, P={found['ranks']}; best "
            f"{found['best'][0]} x {found['best'][1]}",
            "R x C", "forward MB", "backward MB", "of ring", "of all-gather", "forward elements of ring",
        )  # fmt: skip
        for row in found["grids"]:
            ratios = (row[f"{n}_ring"] for n in ("step_bytes_of", "forward_elements_of"))
            first, last = (f"{x:.3f}" for x in ratios)
            table.add_row(
                f"{row['rows']} x {row['columns']}", _mb(row["forward_bytes"]), _mb(row["backward_bytes"]),
                first, f"{row['step_bytes_of_allgather']:.3f}", last,
            )  # fmt: skip
        console.print(table)
    if "least" in result:
        table = _table("who sends least: MB of the busiest rank, forward + backward", "heads", "P", "mask",
                       *("1st", "2nd", "3rd", "4th", "5th"))  # fmt: skip
        for found in result["least"]:
            mask_name = f"{'causal' if found['causal'] else 'full'} {found['layout']}"
            ways = [f"{w['name']} {_mb(w['step_busiest_bytes'])}" for w in found["ways"]]
            table.add_row("{}/{}".format(*found["heads"]), str(found["ranks"]), mask_name, *ways)
        console.print(table)
    if "windowed" in result:
        table = _table(
            f"causal, window {result['windowed']['window']}: busiest rank, CPU of the median one",
            "series", "", "P", "N", "MB", "scores", "CPU ms",
        )  # fmt: skip
        for p in result["windowed"]["points"]:
            table.add_row(
                p["series"], p["name"], str(p["ranks"]), str(p["length"]), f"{p['busiest_bytes'] / 1e6:.3f}",
                f"{p['busiest_scores']:,}", f"{1e3 * p['seconds']:.1f}",
            )  # fmt: skip
        console.print(table)


def _table(title: str, *names: str) -> Table:
    table = Table(title=title)
    for n, name in enumerate(names):
        table.add_column(name, justify="right" if n else "left")
    return table


def _mb(x: float) -> str:
    return f"{x / 1e6:,.1f}"


def main() -> None:
    """Parses arguments, computes, counts, prints; fails when one of the `failures` is found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--heads", type=int, nargs=2, action="append", metavar=("QUERY", "KV"),
        help="may be given again (32 8 and 32 32)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[4, 8, 16, 64], help="`volumes` takes the first"
    )
    parser.add_argument("--length", type=int, default=131072, help="tokens, for the dry runs")
    parser.add_argument("--d", type=int, default=128, help="width of a head, for the dry runs")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--window", type=int, default=1024, help="keys a row sees, itself included")
    parser.add_argument("--rows", type=int, default=2048, help="of a rank, with a window")
    parser.add_argument("--windowed-ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument(
        "--rounds", type=int, default=3, help="of windowed steps; the median counts"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--plot", type=Path, help="draw the windowed part into this file")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    all_heads = args.heads or [[32, 8], [32, 32]]
    numbers = (
        *args.ranks,
        *args.windowed_ranks,
        args.length,
        args.d,
        args.window,
        args.rows,
        args.rounds,
    )
    if min(*numbers, *(n for heads in all_heads for n in heads)) < 1:
        parser.error("heads, ranks, length, d, window, rows and rounds must be at least 1")
    if any(hq % hkv for hq, hkv in all_heads):
        parser.error(f"query heads must be a multiple of kv heads, got {all_heads}")
    if args.plot and "windowed" not in args.parts:
        parser.error("--plot draws the windowed part; add it to --parts")

    torch.set_num_threads(1)
    shapes = [Shape(1, *heads, args.d, args.d, getattr(torch, args.dtype)) for heads in all_heads]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "python": platform.python_version(),
        "torch": torch.__version__, "command": " ".join(["strategy_traffic.py", *sys.argv[1:]]),
        "length": args.length, "d": args.d, "dtype": args.dtype,
    }  # fmt: skip
    for part in args.parts:
        if part == "windowed":
            result[part] = windowed(
                args.rows, args.window, sorted(args.windowed_ranks), args.rounds
            )
            continue
        result[part] = []
        all_ranks = args.ranks[:1] if part == "volumes" else args.ranks
        for ranks, shape in progress.track([(p, s) for s in shapes for p in all_ranks], part):
            if part == "grids":
                result[part].append(grids(ranks, args.length, shape))
            else:
                made = volumes if part == "volumes" else least
                result[part] += made(ranks, args.length, shape)
    result["failures"] = failures(result)
    show(result, Console())
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result["windowed"], args.plot)
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
