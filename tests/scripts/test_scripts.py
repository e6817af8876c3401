"""The scripts as their users start them, small."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def start(script, *options, ranks=None):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks else []), SCRIPTS / script, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_check_equivalence_passes_under_torchrun(tmp_path):
    done = start(
        "check_equivalence.py", "--dtype", "float32", "--json", tmp_path / "x.json", ranks=3
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "P=3: 252 cases, 0 failures" in done.stdout
    assert json.loads((tmp_path / "x.json").read_text())["ranks"] == 3


def test_compare_counts_what_the_formula_says(tmp_path):
    options = ["--length", 130, "--dtype", "float32", "--rounds", 1, "--json", tmp_path / "x.json"]
    done = start("compare.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["one device", "ring", "ulysses"]
    assert all(row["sent_bytes"] == row["formula_bytes"] for row in result["rows"])


def test_memory_scaling_measures_and_plots(tmp_path):
    options = ["--lengths", 256, 512, 1024, "--ranks", 1, 2, "--memory-mib", 64]
    done = start(
        "memory_scaling.py", *options, "--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"
    )
    assert "longest" in done.stdout.lower(), done.stdout + done.stderr
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "x.json").read_text())


def test_every_script_explains_itself():
    for script in sorted(SCRIPTS.glob("*.py")):
        if script.name != "demo_report.py":
            done = start(script.name, "--help")
            assert done.returncode == 0, done.stderr
            assert script.name == "demo_rank.py" or "Example" in done.stdout, script.name
