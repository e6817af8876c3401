"""Draws attention problems, solves them on simulated ranks, and holds every result to float64.

Drawn are sizes, masks, layouts, score terms and types; strategies, implementations and 1 to 8 ranks; strides;
how the call is used (backward twice, one tensor as q, k and v, hooks, checkpointing, no gradients, ...); and
what the tensors hold (steep scores, huge, tiny and constant ones, a NaN or an infinity). What fails is
shrunk, printed and kept in the folder of examples, which the next run tries first.

Example: python scripts/check/fuzz.py --cases 2000
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from unittest import SkipTest

import torch
from fuzzing.judge import judge
from fuzzing.problem import Problem, problems
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from seqpar.commands.arguments import parser_of

ROUND = 250  # problems of which the smallest that fails is kept


class Fuzz:
    """Counts what was tried, and keeps what was wrong."""

    def __init__(self, folder: Path) -> None:
        self.tried, self.wrong = Counter[str](), list[str]()
        self._last: Problem | None = None
        self._database = DirectoryBasedExampleDatabase(folder)

    def again(self) -> None:
        """Tries what failed before."""
        self._round(1, [Phase.reuse])

    def round(self, count: int) -> None:
        """Tries some problems; of those that fail the smallest is kept."""
        self._round(count, [Phase.generate, Phase.shrink])

    def _round(self, count: int, phases: list[Phase]) -> None:

        @settings(
            max_examples=count, deadline=None, database=self._database, derandomize=False,
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
            phases=phases,
        )  # fmt: skip
        @given(problem=problems())
        def attempt(problem: Problem) -> None:
            self.tried[problem.strategy] += 1
            self._last = problem
            judge(problem)

        try:
            attempt()
        except SkipTest:  # nothing has failed before
            return
        except Exception as error:  # whatever it is: what failed last is the smallest
            lines = str(error).strip().splitlines() or [""]
            self.wrong.append(f"{type(error).__name__}: {lines[0]}\n  {self._last}")
            print(self.wrong[-1], flush=True)


def main() -> None:
    """Tries as many problems as are asked for, or for as long; fails if one is wrong."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument(
        "--examples", type=Path, default=Path(".hypothesis/fuzz"), help="folder of failures"
    )
    parser.add_argument("--json", type=Path, help="write what was tried here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fuzz, start = Fuzz(args.examples), time.monotonic()
    fuzz.again()
    while fuzz.tried.total() < args.cases and time.monotonic() - start < args.seconds:
        fuzz.round(min(ROUND, args.cases - fuzz.tried.total()))
    took = time.monotonic() - start
    print(f"{fuzz.tried.total()} problems in {took:.0f} s, {len(fuzz.wrong)} wrong")
    if args.json:
        told = {
            "tried": dict(fuzz.tried),
            "seconds": took,
            "wrong": fuzz.wrong,
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    if fuzz.wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
