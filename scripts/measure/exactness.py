"""Measures rounding errors against the number of ranks, and which bits depend on it.

Errors: bfloat16 against float64 attention on one device, for every strategy and P, beside two rings that
round to 16 bits between hops; what they emulate is said at `rounding_ring`. Bits: out and all gradients of
P ranks against those of one, `torch.equal`, with ALiBi, sinks and dropout. Ranks are threads of this
process. Exits with 1 when a typical error of ours at some P exceeds 1.5 times that at P = 1 (and where sums
are carried in float32 from block to block, when the largest does), or when bits differ that are promised to
be the same.

Example: python scripts/measure/exactness.py --length 512 --ranks 1 2 4 8 --json numerics.json
"""

from __future__ import annotations

import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from exact_results.bits import measure_bits
from exact_results.errors import METRICS, measure_errors
from rich.console import Console
from rich.table import Table

from seqpar.commands.arguments import parser_of
from seqpar.doctor import versions
from seqpar.testing import NAMES, Case

GROWTH = 1.5  # times the error at P = 1 that is still no growth
FLOOR = (
    1e-4  # of the largest value, the same for every P: a fortieth of a rounding step of bfloat16
)


def grown(records: list[dict[str, Any]]) -> list[str]:
    """Which of our errors exceed 1.5 times that at P = 1, in words.

    The largest of aten is not judged: dk or dv of one of the first keys, which torch's op sums in 16 bits.
    """
    first = {(r["name"], r["implementation"]): r for r in records if r["ranks"] == 1}
    return [
        f"{r['name']} ({r['implementation']}), P = {r['ranks']}: {metric} error of {name} is "
        f"{error:.2e}, at P = 1 {one:.2e}"
        for r in records
        if r["ours"]
        for metric in (METRICS[:1] if r["implementation"] == "aten" else METRICS)
        for name, error in r[metric].items()
        if not error
        <= GROWTH * (one := first[r["name"], r["implementation"]][metric][name]) + FLOOR
    ]


def broken(records: list[dict[str, Any]]) -> list[str]:
    """Which promises of equal bits are not kept, in words."""
    return [
        f"{r['strategy']}, {r['layout']}, {r['implementation']}, {r['dtype']}: "
        f"{name} differs with {size} ranks"
        for r in records
        if r["promised"]
        for size, by_name in r["differences"].items()
        for name, found in by_name.items()
        if not found["equal"]
    ]


def show_errors(records: list[dict[str, Any]], console: Console) -> None:
    """Prints typical errors by P, and how both metrics grow."""
    ranks = sorted({r["ranks"] for r in records})
    table = Table(
        title="Typical error of a row in bfloat16, in thousandths; growth from P = 1 to the last"
    )
    for column in ("", "implementation", "result"):
        table.add_column(column)
    for column in (*(f"P={n}" for n in ranks), "growth", "of largest"):
        table.add_column(column, justify="right")
    for key in dict.fromkeys((r["name"], r["implementation"]) for r in records):
        of = {r["ranks"]: r for r in records if (r["name"], r["implementation"]) == key}
        for name in NAMES:
            typical, largest = ([of[n][metric][name] for n in ranks] for metric in METRICS)
            cells = [f"{1e3 * x:.2f}" for x in typical]
            growth = [f"{x[-1] / x[0]:.2f}" if x[0] else "-" for x in (typical, largest)]
            table.add_row(*key, name, *cells, *growth, end_section=name == NAMES[-1])
    console.print(table)


def show_bits(records: list[dict[str, Any]], console: Console) -> None:
    """Prints for every P whether all results are equal, else the share of their elements that differs."""
    ranks = list(records[0]["differences"]) if records else []
    table = Table(
        title="Bits against P = 1: equal, or the share of elements that differ; largest difference"
    )
    for column in ("strategy", "layout", "implementation", "dtype", "promised"):
        table.add_column(column)
    for column in (*(f"P={n}" for n in ranks), "steps"):
        table.add_column(column, justify="right")
    for r in records:
        by_size = r["differences"]
        cells = []
        for found in by_size.values():
            differ, elements = (sum(x[n] for x in found.values()) for n in ("differ", "elements"))
            equal = all(x["equal"] for x in found.values())
            cells.append("equal" if equal else f"{100 * differ / elements:.2g} %")
        steps = max((found[n]["steps"] for found in by_size.values() for n in NAMES), default=0.0)
        table.add_row(
            r["strategy"], r["layout"], r["implementation"], r["dtype"],
            "yes" if r["promised"] else "no", *cells, f"{steps:.2g}",
        )  # fmt: skip
    console.print(table)


def by_lines(found: dict[str, Any]) -> str:
    """JSON with a line for every entry and for every record of a list, which can be read and compared."""
    entries = []
    for name, value in found.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(json.dumps(x) for x in value) + "\n]"
        entries.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> None:
    """Parses arguments, measures, prints; fails when errors grow with P or promised bits differ."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens, where errors are measured"
    )
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--d", type=int, default=64, help="width of a head")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=list(range(1, 9)),
        help="P of the errors; 1 is added",
    )
    parser.add_argument(
        "--bits-length", type=int, default=460, help="tokens, where bits are compared"
    )
    parser.add_argument("--bits-ranks", type=int, nargs="+", default=[2, 3, 4, 5, 7, 8])
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="written to the JSON"
    )
    parser.add_argument("--json", type=Path, help="write both tables here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    case = Case(args.length, args.heads, args.kv_heads, args.d, args.d, dtype=torch.bfloat16)
    errors_found = measure_errors(case, sorted({1, *args.ranks}))
    bits_found = measure_bits(args.bits_length, args.bits_ranks)
    console = Console(width=140)
    show_errors(errors_found, console)
    show_bits(bits_found, console)
    failures = grown(errors_found) + broken(bits_found)
    if args.json:
        setting = {
            "length": args.length, "heads": args.heads, "kv_heads": args.kv_heads, "d": args.d,
            "dtype": "bfloat16", "causal": True,
        }  # fmt: skip
        found = {
            "date": args.date, "versions": versions(), "command": shlex.join(sys.argv),
            "setting": setting, "errors": errors_found, "bits_length": args.bits_length,
            "bits": bits_found, "failures": failures,
        }  # fmt: skip
        args.json.write_text(by_lines(found))
    for failure in failures:
        print(f"FAILED {failure}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
