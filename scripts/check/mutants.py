"""Changes one thing at a time in the package, and counts the changes that no test notices.

It draws places by chance and makes a small change in each: another comparison or operator, a number plus one,
a condition negated, a call left out, nothing returned. Then run the tests that have run that line, quick ones
of every file first. Which these are is taken from a run of the suite with pytest-cov:

    pytest --cov=seqpar --cov=seqpar_kernels --cov-branch --cov-context=test --junitxml=report.xml

Example: python scripts/check/mutants.py --sample 500 --json mutants.json
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path

from mutating.attempt import Outcome, Tree
from mutating.mutant import Mutant, mutants_of
from mutating.who import TestsOf

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "layout": "seqpar/layout/*.py",
    "strategies": "seqpar/strategies/*.py",
    "comm": "seqpar/comm/*.py",
    "reference": "kernels/seqpar_kernels/reference.py",
    "loss": "seqpar/loss.py",
    "gradients": "seqpar/gradients.py",
    "data": "seqpar/data.py",
    "ahead": "seqpar/ahead.py",
    "batches": "seqpar/batches.py",
}
ROUNDS = (8.0, 60.0)  # seconds of tests: few first, and many where these notice nothing
CONTROL = (2.0,)  # seconds of tests of a file without a change


def chosen(mutant: Mutant, tests_of: TestsOf, seconds: float) -> list[str]:
    """Tests that run a line, for so many seconds.

    First come those of the mutant's own part of the package, then of all files in turn the quickest.
    """
    own, ranked, seen = f"tests/{mutant.file.parent.name}/", [], Counter[str]()
    for test in tests_of.of(mutant.file, mutant.line):
        file = test.split("::")[0]
        turn = -1 if test.startswith(own) else seen[file]
        ranked.append((turn, tests_of.seconds(test), test))
        seen[file] += 1
    found: list[str] = []
    for _, took, test in sorted(ranked):
        seconds -= took
        if found and seconds < 0:
            break
        found.append(test)
    return found


@cache
def _tree() -> Tree:
    return Tree(ROOT)


def outcome(rounds: Sequence[Sequence[str]], mutant: Mutant) -> Outcome:
    """What becomes of the tests, with the change."""
    _tree().write(mutant.file, mutant.text)
    try:
        for tests, seconds in zip(rounds, ROUNDS, strict=False):
            found = _tree().outcome(tests, 30 + 4 * seconds)
            if found != "pass":
                return found
        return "pass"
    finally:
        _tree().restore(mutant.file)


def drawn(parts: Sequence[str], sample: int, seed: int) -> list[Mutant]:
    """Some of the mutants of parts of the package."""
    files = [path for part in parts for path in sorted(ROOT.glob(PARTS[part]))]
    everything = [mutant for path in files for mutant in mutants_of(path.relative_to(ROOT))]
    return random.Random(seed).sample(everything, min(sample, len(everything)))


def unchanged(mutant: Mutant) -> Mutant:
    """A file as it is, of which no test may complain."""
    return replace(mutant, before="nothing", after="nothing", text=(ROOT / mutant.file).read_text())


def main() -> None:
    """Prints each change that no test noticed, and how many there are."""
    # Not above: processes that run mutants import this file, and must import the package as it was changed.
    from seqpar.commands.arguments import parser_of

    parser = parser_of(__doc__)
    parser.add_argument("--coverage", type=Path, default=Path(".coverage"))
    parser.add_argument("--report", type=Path, default=Path("report.xml"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sample", type=int, default=500, help="changes to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write what was found here")
    args = parser.parse_args()
    tests_of, found = TestsOf(args.coverage, args.report), defaultdict[str, list[str]](list)
    mutants = [
        mutant
        for mutant in drawn(args.parts, args.sample, args.seed)
        if tests_of.of(mutant.file, mutant.line)
    ]
    print(
        f"{args.sample - len(mutants)} of {args.sample} lines run in no test, or in other processes"
    )
    controls = {mutant.file: unchanged(mutant) for mutant in mutants}
    with ProcessPoolExecutor(args.jobs, mp_context=mp.get_context("spawn")) as pool:
        futures = {}
        for mutant in (*controls.values(), *mutants):
            is_control = mutant is controls[mutant.file]
            seconds = CONTROL if is_control else ROUNDS
            rounds = [chosen(mutant, tests_of, most) for most in seconds]
            futures[pool.submit(outcome, rounds, mutant)] = mutant
        for done in as_completed(futures):
            mutant = futures[done]
            if mutant is not controls[mutant.file]:
                found[done.result()].append(str(mutant))
                print(f"tests {done.result()}: {mutant}", flush=True)
            elif done.result() != "pass":
                pool.shutdown(wait=False, cancel_futures=True)
                raise RuntimeError(f"tests {done.result()} without a change in {mutant.file}")
    noticed = len(mutants) - len(found["pass"])
    share = noticed / max(len(mutants), 1)
    print(f"{len(mutants)} changes, {noticed} noticed: {share:.1%}, of which in")
    print(f"{len(found['take too long'])} cases tests took too long")
    if args.json:
        told = {
            "tried": len(mutants),
            "unnoticed": found["pass"],
            "too long": found["take too long"],
        }
        args.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
