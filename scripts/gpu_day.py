"""Everything there is to run on a CUDA GPU, in order of worth: is it right, is it clean, how fast is it.

Each part is a program of its own with a time limit. What it prints and measures is written before the
next part starts, so that a part that fails, or a day that ends early, costs only itself.

Example: python scripts/gpu_day.py --out gpu-day
Example: python scripts/gpu_day.py --out gpu-day --parts rates ring
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from seqpar.commands.arguments import parser_of

ROOT = Path(__file__).parent.parent
MEASURE = "scripts/measure"
PYTHON = sys.executable
SETTINGS, TUNED = range(12), range(3)  # of kernel_speed.py
SANITIZED = (
    ("memcheck", "--documents 3"), ("memcheck", "--window 50 --d 40"), ("racecheck", "--documents 3"),
    ("racecheck", ""),
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Commands that answer one question, at the same time if `at_once`; `{out}` is the folder for results."""

    name: str
    seconds: int
    commands: Sequence[str]
    at_once: bool = False


@dataclass
class Outcome:
    """How a part ended."""

    part: str
    status: str
    seconds: float
    commands: list[str] = field(default_factory=list)


PARTS = (
    Part("doctor", 60, ["{python} -m seqpar doctor"]),
    Part("tests", 330, ["{python} -m pytest -q -n {jobs} --dist worksteal tests/gpu"]),
    Part("sanitizer", 60, [
        f"compute-sanitizer --tool {tool} --error-exitcode 3 {{python}} {MEASURE}/gpu_launches.py {how}"
        for tool, how in SANITIZED
    ], at_once=True),
    # Compiles what the next part times, side by side.
    Part("compile", 90, [
        f"{{python}} {MEASURE}/kernel_speed.py --parts rates --rounds 1 --settings {n}"
        for n in SETTINGS
    ], at_once=True),
    Part("rates", 60, [
        f"{{python}} {MEASURE}/kernel_speed.py --parts rates --json {{out}}/rates.json "
        "--markdown {out}/rates.md"
    ]),
    Part("calls", 90, [f"{{python}} {MEASURE}/gpu_calls.py --json {{out}}/calls.json"]),
    Part("compile_choice", 75, [
        f"{{python}} -m seqpar doctor --measure --rounds 1 --widths {width} --profiles {{out}}/warm_{width}"
        for width in (64, 128, 256)
    ], at_once=True),
    Part("choice", 45, ["{python} -m seqpar doctor --measure --profiles {out}/profiles"]),
    Part("ring", 45, [
        f"{{python}} {MEASURE}/kernel_speed.py --parts ring --rounds 5 --json {{out}}/ring.json "
        "--markdown {out}/ring.md"
    ]),
    Part("compile_tiles", 170, [
        f"{{python}} {MEASURE}/kernel_speed.py --tune {kernel} --settings {n} --rounds 1"
        for kernel in ("forward", "dkdv", "dq") for n in TUNED
    ], at_once=True),
    Part("tune", 80, [
        f"{{python}} {MEASURE}/kernel_speed.py --tune {kernel} --json {{out}}/tune_{kernel}.json "
        f"--markdown {{out}}/tune_{kernel}.md"
        for kernel in ("forward", "dkdv", "dq")
    ]),
    Part("blocks", 330, ["{python} -m pytest -q -n {jobs} --dist worksteal tests/block"]),
    Part("counters", 60, [
        "ncu --clock-control none --section SpeedOfLight --section Occupancy --section WarpStateStats "
        "--section LaunchStats --kernel-name regex:forward_kernel|dq_kernel|dkdv_kernel "
        f"{{python}} {MEASURE}/gpu_launches.py --tokens 16384 --heads 16 --kv-heads 16"
    ]),
)  # fmt: skip


def run(part: Part, out: Path, scale: float = 1.0) -> Outcome:
    """Runs a part and writes what its commands print; one that exceeds its time is ended."""
    commands = [
        c.format(
            python=shlex.quote(PYTHON),
            out=shlex.quote(str(out)),
            jobs=max(1, (os.cpu_count() or 2) - 4),
        )
        for c in part.commands
    ]
    start, limit = time.monotonic(), part.seconds * scale
    statuses: list[str] = []
    batches = [commands] if part.at_once else [[c] for c in commands]
    for n, batch in enumerate(batches):
        left = start + limit - time.monotonic()
        statuses += _run_at_once(batch, out / f"{part.name}_{n}", left)
    wrong = [s for s in statuses if s != "ok"]
    status = "ok" if not wrong else "; ".join(dict.fromkeys(wrong))
    return Outcome(part.name, status, round(time.monotonic() - start, 1), commands)


def _run_at_once(commands: Sequence[str], log: Path, seconds: float) -> list[str]:
    """How each of the commands ended, all started together."""
    if seconds <= 0:
        return ["no time left"] * len(commands)
    end, running = time.monotonic() + seconds, []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    for n, command in enumerate(commands):
        words = shlex.split(command)
        if shutil.which(words[0]) is None:
            running.append((None, None, words[0]))
            continue
        file = log.with_name(f"{log.name}_{n}.log").open("w")
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        running.append((process, file, command))
    return list(_endings(running, end))


def _endings(running, end: float) -> Iterator[str]:  # type: ignore[no-untyped-def]
    for process, file, command in running:
        if process is None:
            yield f"{command} is not here"
            continue
        try:
            code = process.wait(max(0.1, end - time.monotonic()))
            yield "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            yield "took too long"
        finally:
            file.close()


def main() -> None:
    """Runs the parts that were asked for; fails if one did."""
    parser = parser_of(__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--scale", type=float, default=1.0, help="of all time limits")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for part in PARTS:
        if part.name not in args.parts:
            continue
        outcomes.append(run(part, args.out.resolve(), args.scale))
        last = outcomes[-1]
        print(f"{last.part:<10} {last.seconds:6.1f} s  {last.status}", flush=True)
        (args.out / "day.json").write_text(
            json.dumps([asdict(o) for o in outcomes], indent=1) + "\n"
        )
    if any(outcome.status != "ok" for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
