"""The `seqpar` command: parses arguments and prints; what `doctor` says is made in `seqpar.doctor`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from seqpar import __version__, doctor
from seqpar.commands import bench, check, profile
from seqpar_kernels.profile import device_name, path_of


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
    command.add_argument(
        "--measure", action="store_true",
        help="instead of the self-check: time what computes attention on this device (minutes), and keep "
        "the result, which is what chooses from then on",
    )  # fmt: skip
    measured = command.add_argument_group("with --measure")
    measured.add_argument("--widths", type=int, nargs="+", default=profile.WIDTHS, help="of heads")
    measured.add_argument("--lengths", type=int, nargs="+", help="in tokens")
    measured.add_argument("--rounds", type=int, default=5)
    measured.add_argument(
        "--profiles", type=Path, metavar="FOLDER",
        help="keep it there; programs find it where SEQPAR_PROFILES names the folder",
    )  # fmt: skip
    command.set_defaults(run=_doctor)
    check.add_to(commands)
    bench.add_to(commands)
    args = parser.parse_args(arguments)
    return args.run(args)


def _doctor(args: argparse.Namespace) -> int:
    if args.measure:  # also where a profile is broken
        return _measure(args)
    try:
        machine = doctor.examine()
    except ValueError as error:
        print(error)
        return 1
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


def _measure(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"Forward + backward of one rank, causal, bfloat16, on {device_name(device)}")
    made = profile.measure(
        device,
        lambda line: print(f"  {line}", flush=True),
        widths=args.widths,
        lengths=args.lengths,
        rounds=args.rounds,
    )
    path = path_of(made.device, args.profiles)
    made.write(path)
    if args.json:
        made.write(args.json)
    print(f"\nKept in {path}. Delete it, and what ships with seqpar chooses again.")
    return 0
