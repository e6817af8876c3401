"""Runs the tests that touch what is inside torch and transformers, in an environment of other versions.

pyproject.toml declares a lower and an upper end for each of these packages; "oldest" installs the lower ends,
"newest" whatever a resolver takes up to the upper ones, and "oldest-transformers" what is locked but for
transformers at its lower end. "torchtitan" is what is locked but for what torchtitan holds back, "deepspeed"
what is locked and DeepSpeed, which is built from source. The table in docs/testing.md is made of what this
prints.

Example: python scripts/upkeep/check_versions.py oldest --python python3.12 --json oldest.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
import tomllib
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RANGED = (
    "torch", "triton", "transformers", "accelerate", "peft", "einops", "jaxtyping", "numpy",
)  # fmt: skip
SETS = ("oldest", "newest", "oldest-transformers", "torchtitan", "deepspeed")
# What touches the insides of others: kernels, ops, compilation, checkpointing, models, tensor parallel.
TESTS = (
    "tests/block", "tests/comm", "tests/strategies/test_autograd.py", "tests/strategies/test_compile.py",
    "tests/strategies/test_keep_attention.py", "tests/training/test_wrappers.py", "tests/integrations",
    "tests/tensor_parallel", "tests/packaging/test_first_call.py",
)  # fmt: skip
DEEPSPEED = "deepspeed==0.19.8"  # which only runs where torch was installed before
OF_SET = {
    "oldest-transformers": ("tests/integrations", "tests/tensor_parallel/test_replace_calls.py"),
    "torchtitan": (
        "tests/integrations/test_torchtitan.py",
        "tests/integrations/test_torchtitan_refusals.py",
    ),
    "deepspeed": ("tests/training/test_deepspeed.py",),
}
# What a set has ranges of its own for.
FREED = {
    "oldest-transformers": ("transformers==", "huggingface-hub==", "tokenizers=="),
    "torchtitan": ("datasets==", "dill==", "fsspec==", "huggingface-hub==", "multiprocess=="),
}


def lower_ends(pyproject: dict[str, Any]) -> dict[str, str]:
    """By package, the version that its range in pyproject.toml starts with."""
    project = pyproject["project"]
    extras = project["optional-dependencies"].values()
    found = {}
    for requirement in chain(project["dependencies"], *extras):
        match = re.match(r"([\w-]+)>=([\d.]+)", requirement)
        if match and match[1] in RANGED:
            found[match[1]] = match[2]
    missing = set(RANGED) - set(found)
    if missing:
        raise ValueError(f"pyproject.toml has no lower end for {sorted(missing)}")
    return found


def constraints(name: str, lows: dict[str, str], locked: list[str]) -> list[str]:
    """What pip is held to, a line each."""
    if name == "oldest":
        return [f"{package}=={version}" for package, version in lows.items()]
    if name == "newest":
        return []
    kept = [line for line in locked if not line.startswith(FREED.get(name, ()))]
    return [*kept, f"transformers=={lows['transformers']}"] if "transformers" in name else kept


def make_environment(folder: Path, python: str, held: list[str], extras: str = "dev") -> Path:
    """The Python of an environment with this package for development, made as `.venv` is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    constraint = folder.with_suffix(".txt")
    constraint.write_text("".join(f"{line}\n" for line in held))
    settings = {"PYTHON": python, "SEQPAR_VENV": str(folder), "SEQPAR_CONSTRAINT": str(constraint)}
    settings["SEQPAR_EXTRAS"] = extras
    command = ["bash", "-c", "source scripts/setup.sh"]
    subprocess.run(command, cwd=ROOT, env=os.environ | settings, check=True)
    return folder / "bin" / "python"


def add_deepspeed(inside: Path) -> None:
    """Installs it without its kernels; what it sends by on CPUs is compiled when it is first used."""
    command = [
        inside,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "setuptools",
        "wheel",
    ]
    subprocess.run(command, check=True)
    command = [*command[:-2], DEEPSPEED]
    subprocess.run(command, env=os.environ | {"DS_BUILD_OPS": "0"}, check=True)


def versions(inside: Path) -> dict[str, str]:
    """What is installed there."""
    listed = [inside, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
    done = subprocess.run(listed, check=True, capture_output=True, text=True)
    found = {package["name"]: package["version"] for package in json.loads(done.stdout)}
    return {"python": python_version(inside)} | {
        n: found[n] for n in (*RANGED, "deepspeed") if n in found
    }


def python_version(python: Path) -> str:
    """The version of an interpreter."""
    asked = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def run_tests(inside: Path, tests: list[str], workers: int) -> dict[str, Any]:
    """How many passed, failed and were skipped, and which failed."""
    command = [
        inside,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
        "--tb=line",
    ]
    command += ["-n", str(workers), "--dist", "worksteal", *tests]
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CI": "true"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout)
    counts = {
        kind: int(match[1]) if (match := re.search(rf"(\d+) {kind}", done.stdout)) else 0
        for kind in ("passed", "failed", "skipped", "error")
    }
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    seconds = round(time.monotonic() - start)
    return {**counts, "exit": done.returncode, "seconds": seconds, "failures": failures}


def main() -> None:
    """Parses arguments, makes the environment, runs the tests; exits as pytest does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--python", default=sys.executable, help="that the environment is made of")
    parser.add_argument("--folder", type=Path, help="of the environment; by default .versions/SET")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument(
        "--tests", nargs="+", help="by default those that touch what is inside others"
    )
    parser.add_argument("--json", type=Path, help="write versions and counts here")
    args = parser.parse_args()

    lows = lower_ends(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    locked = (ROOT / "scripts" / "lock.txt").read_text().splitlines()
    folder = args.folder or ROOT / ".versions" / args.set
    extras = "dev,torchtitan" if args.set == "torchtitan" else "dev"
    inside = make_environment(folder, args.python, constraints(args.set, lows, locked), extras)
    if args.set == "deepspeed":
        add_deepspeed(inside)
    found, asked = versions(inside), python_version(Path(args.python))
    if found["python"] != asked:
        raise SystemExit(f"{folder} has Python {found['python']}, not {asked}; remove it first")
    print("  ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    result = run_tests(inside, args.tests or list(OF_SET.get(args.set, TESTS)), args.workers)
    row = {"set": args.set, "date": str(date.today()), "machine": platform.machine()}
    row |= {"versions": found, "result": result}
    if args.json:
        args.json.write_text(json.dumps(row, indent=1) + "\n")
    print(f"{args.set}: {result['passed']} passed, {result['failed']} failed on {row['date']}")
    if result["exit"]:
        raise SystemExit(result["exit"])


if __name__ == "__main__":
    main()
