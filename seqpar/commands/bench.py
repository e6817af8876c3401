"""`seqpar bench`: time, bytes and memory of strategies, beside one process and other packages, in one run."""

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
from seqpar.commands.contest import Outcome, contest
from seqpar.commands.peers import PEERS
from seqpar.commands.steps import Setting
from seqpar.layout import LAYOUTS
from seqpar.testing import TorchrunWorld

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DESCRIPTION = """\
Compares strategies with one process and with other packages: time, bytes, peak memory, in one run.

P ranks with one thread each against one process with --threads threads that runs torch's own
scaled_dot_product_attention on the whole sequence. Other packages take part where they are installed:
DeepSpeed, yunchang, ring-flash-attn, and torch's own context parallel attention.

Each contender's results are compared with one device before it is timed; what is wrong or fails is
named and not timed. Rounds alternate between all, so that what else the machine does hits all alike; the
ratio is the median of those of rounds, between its quartiles. Starts its own processes, and exits with
1 when a strategy is wrong or the bytes counted are not those of the dry run."""
EXAMPLE = (
    "Example: seqpar bench --length 8192 --ranks 2 --dtype float32 bfloat16 --passes forward both"
)
CONTENDERS: dict[str, str] = {  # strategy -> the layout it likes best
    "ring": "zigzag", "ulysses": "contiguous", "allgather": "zigzag", "mesh": "zigzag",
    "hybrid": "zigzag", "materialised_rows": "zigzag",
}  # fmt: skip
LINE = "  {:<20}{:<12}" + "{:>10}" * 2 + "{:>14}" + "{:>12}" * 4
HEADER = "", "layout", "ms", "ratio", "quartiles", "sent MB", "derived MB", "peak MB", "error"
PASSES = {"forward": False, "both": True}  # -> whether gradients are computed


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "bench",
        help="time, bytes and memory of strategies, beside one process and other packages",
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
    add(
        "--peers", nargs="*", choices=PEERS, default=[name for name in PEERS if PEERS[name].is_installed],
        help="by default all that are installed; give none to leave them out",
    )  # fmt: skip
    add(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=["both"],
        help="forward alone, or gradients too",
    )
    add("--ring-layout", choices=LAYOUTS, default=CONTENDERS["ring"])
    add("--ulysses-layout", choices=LAYOUTS, default=CONTENDERS["ulysses"])
    add("--rounds", type=positive, default=9)
    add("--json", type=Path, metavar="PATH", help="also write the results here")
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if TorchrunWorld.is_here():
        parser.error("bench starts processes of its own; start it without torchrun")
    results, failed = [], []
    for setting in _settings(args):
        print(_title(setting, args.ranks, args.rounds), flush=True)
        outcome = contest(setting, args.ranks, args.threads, args.rounds, _say)
        print("\n".join(_table(outcome)), flush=True)
        results.append(_result(setting, outcome, args))
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        failed += [f"{what}, N={setting.length} {_name(setting)}" for what in _failures(outcome)]
    for what in failed:
        print(f"FAILED {what}")
    return 1 if failed else 0


def _failures(outcome: Outcome) -> Iterator[str]:
    """What must not be, of the strategies of this package."""
    for name, why in outcome.refused.items():
        if name not in PEERS:
            yield f"{name}: {why}"
    for row in outcome.rows:
        if row.sent_bytes != row.derived_bytes:
            yield f"{row.name}: counted bytes differ from the dry run"


def _say(what: str) -> None:
    print(f"  {what}", file=sys.stderr, flush=True)  # results alone go to stdout


def _settings(args: argparse.Namespace) -> Iterator[Setting]:
    chosen = {"ring": args.ring_layout, "ulysses": args.ulysses_layout}
    layouts = {name: chosen.get(name, CONTENDERS[name]) for name in args.strategies}
    layouts |= {name: PEERS[name].layout for name in args.peers}
    for length in args.length:
        for dtype in args.dtype:
            for passes in args.passes:
                yield Setting(
                    length,
                    args.heads,
                    args.d,
                    DTYPE_BY_NAME[dtype],
                    not args.full,
                    PASSES[passes],
                    layouts,
                )


def _name(setting: Setting) -> str:
    return str(setting.dtype).removeprefix("torch.")


def _title(setting: Setting, ranks: int, rounds: int) -> str:
    mask = "causal" if setting.causal else "full"
    passes = "forward + backward" if setting.backward else "forward alone"
    return (
        f"N={setting.length} {_name(setting)} {mask}, {setting.heads} heads of {setting.d}, "
        f"P={ranks}, {passes}, median of {rounds}"
    )


def _table(outcome: Outcome) -> Iterator[str]:
    yield LINE.format(*HEADER)
    for row in outcome.rows:
        yield LINE.format(
            row.name, row.layout, f"{1e3 * row.median_seconds:.1f}", f"{row.ratio:.3f}",
            "{:.3f}-{:.3f}".format(*row.quartiles), _megabytes(row.sent_bytes, 3),
            _megabytes(row.derived_bytes, 3), _megabytes(row.peak_bytes, 1), f"{row.error:.1e}",
        )  # fmt: skip
    for name, why in outcome.refused.items():
        yield f"  {name:<20}not timed: {why}"
    if outcome.others is not None:
        yield f"  other processes used {outcome.others:.0%} of the machine's CPUs meanwhile"


def _megabytes(number: int | None, digits: int) -> str:
    return "-" if number is None else f"{number / 1e6:.{digits}f}"


def _result(setting: Setting, outcome: Outcome, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about a setting, for JSON."""
    return {
        "length": setting.length, "dtype": _name(setting), "causal": setting.causal,
        "heads": setting.heads, "d": setting.d, "ranks": args.ranks,
        "threads_of_one_device": args.threads, "rounds": args.rounds,
        "backward": setting.backward, **asdict(outcome),
    }  # fmt: skip
