"""`seqpar check`: every strategy against dense float64 attention, gradients and bytes sent included."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from seqpar.commands.arguments import DTYPE_BY_NAME, positive
from seqpar.commands.equivalence import Record, Run, compare
from seqpar.strategies import STRATEGIES
from seqpar.testing import NAMES, ProcessWorld, TorchrunWorld, WorldError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DESCRIPTION = """\
Checks, over real processes, that every strategy equals one-device attention, gradients included.

Strategy x layout x mask x dtype x head counts, with lengths that do and do not divide; each compared
with dense float64 attention, and the bytes each rank sent with a dry run. Prints a line for every
combination, with its largest error as a share of what is allowed, and exits with 1 when anything is off,
naming the case. Ring and Ulysses, which the others are made of, get every case, the others a third of
them.

Without torchrun it starts processes of its own; under torchrun it joins those that are there."""
EXAMPLE = """Example: seqpar check --ranks 3 --dtype float64
         torchrun --nproc-per-node 3 -m seqpar check --json equivalence.json"""
RANKS = 3
PATIENCE_SECONDS = 600.0  # for the cases of one line, on a machine that does other things too
LINE = "{:<21}{:<11}{:<25}{:<9}" + "{:>9}" * len(NAMES) + "{:>6}{:>7}"


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "check",
        help="every strategy, layout, mask and dtype against dense float64 attention",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ranks", type=positive, metavar="P", help=f"processes to start, by default {RANKS}"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPE_BY_NAME, default=list(DTYPE_BY_NAME))
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the records here")
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if not TorchrunWorld.is_here():
        with ProcessWorld(args.ranks or RANKS) as world:
            return _check(args, partial(world.run, timeout=PATIENCE_SECONDS), world.size, print)
    if args.ranks is not None:
        parser.error("torchrun says how many processes there are; leave --ranks out")
    torch.set_num_threads(1)
    with TorchrunWorld() as joined:
        say = print if joined.rank == 0 else _nothing
        return _check(args, joined.run, joined.size, say)


def _check(args: argparse.Namespace, run: Run, size: int, say: Callable[..., None]) -> int:
    """Compares and says what comes of it; the exit code."""
    say(f"P={size}: largest error as a share of what is allowed, worst rank and case")
    say(LINE.format("strategy", "layout", "mask", "dtype", *NAMES, "cases", "failed"))
    records = []
    try:
        for record in compare(run, args.dtype, args.strategy):
            records.append(record)
            for line in _told(record):
                say(line, flush=True)
    except WorldError as error:  # its ranks are gone, so nothing more can be compared
        say(f"FAILED {error}")
        return 1
    num_cases = sum(record.cases for record in records)
    num_failures = sum(len(record.failures) for record in records)
    say(f"P={size}: {num_cases} cases, {num_failures} failures")
    if args.json and say is print:
        written = {"ranks": size, "records": [asdict(record) for record in records]}
        args.json.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if num_failures else 0


def _told(record: Record) -> Iterator[str]:
    """The record in a line of text, with one more for each failure."""
    shares = (f"{record.worst[name]:.2g}" for name in NAMES)
    names = record.strategy, record.layout, record.mask, record.dtype
    yield LINE.format(*names, *shares, record.cases, len(record.failures))
    for failure in record.failures:
        yield f"FAILED {record.strategy}, {record.mask}: {failure}"


def _nothing(*_: object, **__: object) -> None:
    """Says nothing, as all ranks but one do."""
