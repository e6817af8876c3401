"""Compiles the Triton attention kernels ahead of time, without a GPU, and reads what they need.

The launchers of `seqpar_kernels.triton_attention` run on tensors without storage while a recorder stands
in for each kernel, so what is compiled is what a device would compile: types, alignment, constants and
the tiles of `tuning.TABLE`. Masks that lead to the same constants are compiled once and share a line.

Fails if a kernel does not compile, needs more shared memory than the device has, or spills at widths up
to 128. Spills are bytes of local memory (CUDA) or scratch (HIP) a thread; the kernels keep no arrays, so
nothing else is there. Registers are per thread. Seconds are about 0 where Triton's cache has the kernel.

Example: python scripts/measure/kernel_resources.py --targets sm_90 gfx942 --d 64 128 --json kernels.json
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from ahead_of_time.cases import BANDS, FEATURES, TARGETS, make_cases
from ahead_of_time.outcomes import Outcome, compile_all
from rich.console import Console
from rich.table import Table

from seqpar.commands.arguments import parser_of
from seqpar_kernels import tuning


def show(outcomes: list[Outcome], console: Console) -> None:
    """Prints the outcomes as a table."""
    table = Table(title="Triton kernels, compiled ahead of time")
    left = ("target", "kernel", "dtype", "feature", "mask")
    right = ("tiles", "warps", "stages", "registers", "spills", "shared", "limit", "s")
    for column in (*left, "d", *right):
        table.add_column(column, justify="left" if column in left else "right")
    for outcome in outcomes:
        case = outcome.case
        rows, cols, warps, stages = case.tiles
        found = (outcome.registers, outcome.spill_bytes, outcome.shared_bytes)
        table.add_row(
            case.target, case.kernel, case.dtype, case.feature, " = ".join(outcome.masks),
            str(case.d), f"{rows}x{cols}", str(warps), str(stages),
            *("-" if x is None else str(x) for x in found),
            str(outcome.shared_limit_bytes), f"{outcome.seconds:.1f}",
            style="red" if outcome.problems else None,
        )  # fmt: skip
    console.print(table)
    if any(len(outcome.masks) > 1 for outcome in outcomes):
        console.print("Masks joined by = have the same constants: bands are runtime arguments.")


def main() -> None:
    """Parses arguments, compiles, prints; fails when a kernel would not run well."""
    parser = parser_of(__doc__)
    kernels, dtypes = tuning.KERNELS, ("bfloat16", "float16", "float32")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=list(kernels))
    parser.add_argument("--d", type=int, nargs="+", default=[64, 128, 256], help="width of a head")
    parser.add_argument("--masks", nargs="+", choices=BANDS, default=["causal", "full"])
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["bfloat16"])
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=["plain"])
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens; tensors over 2 GiB change AMD code"
    )
    parser.add_argument(
        "--tiles", type=int, nargs=4, metavar=("ROWS", "COLS", "WARPS", "STAGES"),
        help="instead of those of the table",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="by default only sm_90 and gfx942, d = 128, causal"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the results here")
    if "--quick" in sys.argv[1:]:  # narrows what is not asked for
        parser.set_defaults(targets=["sm_90", "gfx942"], d=[128], masks=["causal"])
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET must not be set: the interpreter compiles nothing")

    outcomes = compile_all(make_cases(args), args.jobs)
    console = Console(width=None if Console().is_terminal else 140)
    show(outcomes, console)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    wrong = [
        f"{o.case.target} {o.case.kernel} {o.case.dtype} d={o.case.d} {o.case.feature}: {problem}"
        for o in outcomes
        for problem in o.problems
    ]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
