"""Plants one bug at a time in a copy of the package and records which checks notice.

Each plant is a change of one line that keeps the code running. A plant that no check notices is a
hole in the tests: the script then exits with 1. The result is the table in docs/testing.md.

Example: python scripts/upkeep/plant_bugs.py --markdown plants.md
         python scripts/upkeep/plant_bugs.py --only "forgotten gradient hop"
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from plants.attention import ATTENTION
from plants.batches import BATCHES
from plants.biases import BIAS_PLANTS
from plants.cut_weights import POLICIES
from plants.fused_weights import TENSOR_PARALLEL
from plants.libraries import LIBRARIES
from plants.masks import MASK_PLANTS
from plants.memory import MEMORY
from plants.own_loops import OWN_LOOPS
from plants.parallelisms import PARALLELISMS
from plants.plant import Plant
from plants.replaced_attention import REPLACED
from plants.seeing import SEES
from plants.trainers import TRAINERS

from seqpar.commands import progress

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300
NOT_CHECKED = {
    "seqpar/ahead.py",
    "seqpar/batches.py",
    "seqpar/data.py",
    "seqpar/loader.py",
    "seqpar/logprobs.py",
    "seqpar/loss.py",
    "seqpar/gradients.py",
    "seqpar/head_loss.py",
    "seqpar/host_memory.py",
    "seqpar/row_tiles.py",
    "seqpar/tiled_modules.py",
    "seqpar/comm/agree.py",
    "seqpar/comm/ranks.py",
    "seqpar/layout/fits.py",
    "seqpar/layout/kinds.py",
    "seqpar/packing.py",
    "seqpar/compiled.py",
    "seqpar/checkpointing.py",
    "seqpar/functional.py",
    "seqpar/comm/replay.py",
    "seqpar/calls/check.py",
    "seqpar/calls/options.py",
    "kernels/seqpar_kernels/custom_ops.py",
    "kernels/seqpar_kernels/derivatives.py",
    "kernels/seqpar_kernels/torch_ops.py",
}  # check_equivalence.py is blind to these


PLANTS = [
    *ATTENTION,
    *MASK_PLANTS,
    *PARALLELISMS,
    *BIAS_PLANTS,
    *BATCHES,
    *LIBRARIES,
    *TENSOR_PARALLEL,
    *POLICIES,
    *REPLACED,
    *SEES,
    *OWN_LOOPS,
    *TRAINERS,
    *MEMORY,
]


def planted(plant: Plant, folder: Path) -> None:
    """Copies the sources to `folder` and plants the bug there."""
    for part in ("seqpar", "kernels", "tests", "scripts", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / part
        ignore = shutil.ignore_patterns("__pycache__", ".hypothesis")
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / part, **({"ignore": ignore} if source.is_dir() else {}))
    path = folder / plant.file
    text = path.read_text()
    if text.count(plant.old) != 1:
        raise SystemExit(f"plant {plant.name!r}: {plant.file} must hold its text once")
    path.write_text(text.replace(plant.old, plant.new))


def run(command: list[str], folder: Path) -> tuple[bool, str]:
    """Whether the command failed in the copy, or did not end, and what it printed."""
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "quick"}
    process = subprocess.Popen(
        command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        text, _ = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # which torchrun passes on to its ranks
        process.communicate()
        return True, "FAILED did not end"
    return process.returncode != 0, text


def noticed(plant: Plant) -> tuple[str, str]:
    """(first failing test or "-", first failing line of check_equivalence or "-")."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted(plant, folder)
        failed, text = run([sys.executable, "-m", "pytest", "-xq", "--tb=no", plant.test], folder)
        lines = [x for x in text.splitlines() if x.startswith(("FAILED", "ERROR"))]
        name = lines[0].split(maxsplit=1)[1].split(" - ")[0] if lines else f"{plant.test} crashed"
        by_test = name if failed else "-"
        elsewhere = ("triton", "tensor_parallel", "integrations")
        if plant.file in NOT_CHECKED or any(part in plant.file for part in elsewhere):
            return by_test, "-"
        check = [*torchrun, "scripts/check_equivalence.py", "--dtype", "float64"]
        failed, text = run(check, folder)
        lines = [x for x in text.splitlines() if x.startswith("FAILED")]
        by_check = "-" if not failed else lines[0].removeprefix("FAILED ") if lines else "crashed"
    return by_test, by_check


def main() -> None:
    """Plants every bug in turn and prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of plants")
    parser.add_argument("--markdown", type=Path, help="write the table here too")
    args = parser.parse_args()
    plants = [p for p in PLANTS if not args.only or p.name in args.only]
    table = (
        "| bug | planted in | first test to fail | first line of `check_equivalence.py`, P = 3 |\n"
    )
    table += "|---|---|---|---|\n"
    print(table, end="", flush=True)
    unnoticed = []
    for plant in progress.track(plants, "plants", name=lambda plant: plant.name):
        by_test, by_check = noticed(plant)
        row = f"| {plant.name} | `{plant.file}` | `{by_test}` | {by_check[:100]} |\n"
        print(row, end="", flush=True)
        table += row
        if by_test == "-":
            unnoticed.append(plant.name)
    if args.markdown:
        args.markdown.write_text(table)
    if unnoticed:
        raise SystemExit(f"not noticed by its test: {', '.join(unnoticed)}")


if __name__ == "__main__":
    main()
