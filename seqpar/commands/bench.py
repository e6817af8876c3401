"""`seqpar bench`: time, bytes sent and peak memory of strategies, beside one process in the same run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqpar.commands.arguments import DTYPE_BY_NAME, positive
from seqpar.commands.contest import Row, contest
from seqpar.commands.steps import Setting
from seqpar.layout import LAYOUTS
from seqpar.testing import TorchrunWorld

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DESCRIPTION = """\
Compares strategies with one process: time, bytes against a dry run, peak memory, in one run.

P ranks with one thread each against one process with --threads threads that runs torch's own
scaled_dot_product_attention on the whole sequence. Rounds alternate between the two, so that what
else the machine does hits both alike; the ratio is between medians of rounds. Starts its own processes,
and exits with 1 when the bytes counted are not those of the dry run."""
EXAMPLE = "Example: seqpar bench --length 8192 --ranks 2 --dtype float32 bfloat16"
CONTENDERS: dict[str, str] = {  # strategy -> the layout it likes best
    "ring": "zigzag", "ulysses": "contiguous", "allgather": "zigzag", "mesh": "striped",
    "hybrid": "zigzag", "materialised_rows": "zigzag",
}  # fmt: skip
LINE = "  {:<20}{:<12}" + "{:>12}" * 5
HEADER = "", "layout", "ms", "ratio", "sent MB", "derived MB", "peak MB"


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "bench",
        help="time, bytes sent and peak memory of strategies, beside one process",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--length", type=positive, nargs="+", default=[2048, 8192], help="tokens")
    add("--ranks", type=positive, default=2, metavar="P")
    add("--threads", type=positive, default=2, help="of the one process")
    add("--heads", type=positive, default=8)
    add("--d", type=positive, default=64, help="width of a head")
    add("--dtype", nargs="+", choices=DTYPE_BY_NAME, default=["float32", "bfloat16"])
    add("--full", action="store_true", help="no causal mask")
    add("--strategies", nargs="+", choices=CONTENDERS, default=["ring", "ulysses"])
    add("--ring-layout", choices=LAYOUTS, default=CONTENDERS["ring"])
    add("--ulysses-layout", choices=LAYOUTS, default=CONTENDERS["ulysses"])
    add("--rounds", type=positive, default=9)
    add("--json", type=Path, metavar="PATH", help="also write the results here")
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if TorchrunWorld.is_here():
        parser.error("bench starts processes of its own; start it without torchrun")
    results, off = [], []
    for setting in _settings(args):
        print(_title(setting, args.ranks, args.rounds), flush=True)
        rows = contest(setting, args.ranks, args.threads, args.rounds, _say)
        print("\n".join(_table(rows)), flush=True)
        results.append(_result(setting, rows, args))
        off += [
            f"{row.name} at N={setting.length} {_name(setting)}"
            for row in rows
            if row.sent_bytes != row.derived_bytes
        ]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if off:
        print(f"FAILED counted bytes differ from the dry run: {', '.join(off)}")
    return 1 if off else 0


def _say(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)  # results alone go to stdout


def _settings(args: argparse.Namespace) -> Iterator[Setting]:
    chosen = {"ring": args.ring_layout, "ulysses": args.ulysses_layout}
    layouts = {name: chosen.get(name, CONTENDERS[name]) for name in args.strategies}
    for length in args.length:
        for dtype in args.dtype:
            yield Setting(length, args.heads, args.d, DTYPE_BY_NAME[dtype], not args.full, layouts)


def _name(setting: Setting) -> str:
    return str(setting.dtype).removeprefix("torch.")


def _title(setting: Setting, ranks: int, rounds: int) -> str:
    mask = "causal" if setting.causal else "full"
    return (
        f"N={setting.length} {_name(setting)} {mask}, {setting.heads} heads of {setting.d}, "
        f"P={ranks}, forward + backward, median of {rounds}"
    )


def _table(rows: list[Row]) -> Iterator[str]:
    yield LINE.format(*HEADER)
    for row in rows:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        yield LINE.format(
            row.name, row.layout, f"{1e3 * row.median_seconds:.1f}", f"{row.ratio:.3f}",
            f"{row.sent_bytes / 1e6:.3f}", f"{row.derived_bytes / 1e6:.3f}", peak,
        )  # fmt: skip


def _result(setting: Setting, rows: list[Row], args: argparse.Namespace) -> dict[str, Any]:
    """Everything about a setting, for JSON."""
    return {
        "length": setting.length, "dtype": _name(setting), "causal": setting.causal,
        "heads": setting.heads, "d": setting.d, "ranks": args.ranks,
        "threads_of_one_device": args.threads, "rounds": args.rounds,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
