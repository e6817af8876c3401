"""The `seqpar` command: parses arguments and prints; what `doctor` says is made in `seqpar.doctor`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from seqpar import __version__, doctor
from seqpar.commands import bench, check


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="seqpar", description="Exact attention over sequences sharded over processes."
    )
    parser.add_argument("--version", action="version", version=f"seqpar {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "doctor",
        help="what is installed, what computes attention here, and whether two ranks get it right",
        description="Says which versions and devices are here and which implementation computes "
        "attention on them, and why not another; then compares two ranks with dense float64 "
        "attention. Exits with 1 if they differ.",
    )
    command.add_argument("--json", type=Path, metavar="PATH", help="also write everything here")
    command.add_argument("--no-selfcheck", action="store_true", help="start no ranks")
    command.set_defaults(run=_doctor)
    check.add_to(commands)
    bench.add_to(commands)
    args = parser.parse_args(arguments)
    return args.run(args)


def _doctor(args: argparse.Namespace) -> int:
    machine = doctor.examine()
    print("\n".join(doctor.described(machine)), flush=True)
    checks = []
    if not args.no_selfcheck:
        print("\nSelf-check: two ranks, forward and gradients, against dense float64 attention")
        for check in doctor.selfcheck():
            checks.append(check)
            print(f"  {doctor.told(check)}", flush=True)
    failed = [check for check in checks if check.failures]
    if args.json:
        everything = asdict(machine) | {"selfcheck": [asdict(check) for check in checks]}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    if failed:
        print(f"\n{len(failed)} of {len(checks)} self-checks FAILED")
    return 1 if failed else 0
