"""The scripts as their users start them, small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
VERBS = ("check", "demo", "draw", "measure", "train", "upkeep")
BY_VERB = [path for verb in VERBS for path in (SCRIPTS / verb).glob("*.py")]
PATHS = {path.stem: path for path in (*SCRIPTS.glob("*.py"), *BY_VERB) if path.stem != "moved"}
MOVED = {  # the name it had before, and the script
    "bench_kernels": "kernel_speed",
    "compare_tp_policies": "policy_costs",
    "memory_scaling": "peak_memory",
    "train_bytes": "byte_level",
}
SAME = MOVED | {"check_equivalence": "check", "compare": "bench"}  # by another name
TINY_ROWS = ["--dim", 32, "--heads", 2, "--kv-heads", 2, "--batch", 512, "--checkpointing", "none"]
SMALLEST = {  # script: options, ranks under torchrun, what it prints
    "tensor_parallel_models": (["--families", "llama", "--length", 9], 2, "1 families, 0 failures"),
    "faults": (
        ["--strategies", "ring", "--phases", "before_a_call", "--ranks", 2],
        None, "| ring | before a call |",
    ),
    "training_runs": (
        ["--ranks", 2, "--steps", 2, "--length", 16, "--only", "resumed"],
        None, "resumed at step 1 of P=2",
    ),
    "mask_costs": (["--length", 256, "--runs", 1], None, "8 images in text"),
    "exchange_ways": (["--ranks", 2, "--rows", 4, "--rounds", 2], None, "KiB a rank"),
    "gloo_threads": (
        ["--ranks", 2, "--length", 16, "--rounds", 2, "--dtype", "float32"], None, "N = 16 float32 ulysses",
    ),
    "host_time": (["--ranks", 4], None, "balanced, 1,000 documents, P = 4"),
    "hugging_face": (
        ["--families", "llama", "--strategies", "ring", "--length", 9], 2, "1 cases, 0 failures",
    ),
    "keep_attention": (
        ["--length", 64, "--layers", 1, "--dim", 32, "--ranks", 2, "--strategies", "ring"],
        None, "keep attention",
    ),
    "memory_parts": (
        ["--length", 512, "--layers", 1, "--dim", 32, "--vocabulary", 4096, "--tile", 16, "--ranks", 1,
         "--ways", "nothing saved", "all together"],
        None, "all together",
    ),
    "longest_context": (
        ["--ranks", 1, "--lengths", 16, 48, "--multiple-of", 8, "--memory-mib", 1024, "--", *TINY_ROWS],
        None, "longest sequence within 1024 MiB per rank",
    ),
    "plant_bugs": (
        ["--only", "labels sharded before they are shifted"],
        None, "::test_labels_are_shifted_before_they_are_sharded` | - |",
    ),
    "dp_sp_tp": (
        ["--tp", 2, "--steps", 1, "--length", 32, "--dim", 48, "--layers", 1], 2, "1 steps, loss 5.",
    ),
}  # fmt: skip
ELSEWHERE = {  # script: the test that runs it, small, and looks at what it writes
    "activation_memory": "scripts/test_activation_memory.py",
    "kernel_speed": "scripts/test_kernel_speed.py",  # without a GPU: it refuses, and its parts run
    "fuzz": "scripts/test_fuzz.py",
    "mutants": "scripts/test_mutants.py",
    "gpu_day": "scripts/test_gpu_scripts.py",  # without a GPU, as the two below
    "gpu_calls": "scripts/test_gpu_scripts.py",
    "gpu_launches": "scripts/test_gpu_scripts.py",
    "bench": "packaging/test_fresh.py",
    "check": "cli/test_check.py",
    "check_versions": "scripts/test_check_versions.py",
    "decode_cost": "scripts/test_decode_cost.py",
    "policy_costs": "scripts/test_policy_costs.py",
    "kernel_resources": "scripts/test_kernel_resources.py",
    "doctor": "cli/test_doctor.py",
    "fused_layouts": "tensor_parallel/test_fused_page.py",
    "modules": "scripts/test_module_pictures.py",
    "two_policies": "scripts/test_policy_costs.py",
    "lock": "scripts/test_lock.py",
    "generate": "scripts/test_generate.py",
    "peak_memory": "scripts/test_scripts.py",
    "exactness": "scripts/test_exactness.py",
    "strategy_traffic": "scripts/test_strategy_traffic.py",
    "byte_level": "training/test_commands.py",
}


def start(name, *options, ranks=None):
    """Runs a script without the shape check, as its users do."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks else []), PATHS[name], *map(str, options)]
    environment = os.environ | {"SEQPAR_CHECK_SHAPES": "0", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=environment
    )


def test_check_equivalence_passes_under_torchrun(tmp_path):
    done = start("check_equivalence", "--dtype", "float32", "--json", tmp_path / "x.json", ranks=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "P=3: 252 cases, 0 failures" in done.stdout
    assert json.loads((tmp_path / "x.json").read_text())["ranks"] == 3


def test_compare_counts_what_the_dry_run_says(tmp_path):
    options = ["--length", 130, "--dtype", "float32", "--rounds", 1, "--json", tmp_path / "x.json"]
    done = start("compare", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "x.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["one device", "ring", "ulysses"]
    assert all(row["sent_bytes"] == row["derived_bytes"] for row in result["rows"])


def test_peak_memory_measures_and_plots(tmp_path):
    options = ["--lengths", 256, 512, 1024, "--ranks", 1, 2, "--memory-mib", 64]
    done = start(
        "memory_scaling", *options, "--plot", tmp_path / "x.png", "--json", tmp_path / "x.json"
    )
    assert "longest" in done.stdout.lower(), done.stdout + done.stderr
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "x.json").read_text())


# Runs scripts with --help, each in a fork of a process that has imported torch, which takes them seconds.
EXPLAIN = """
import json, os, runpy, sys
import torch, seqpar

said = {}
for path in sys.argv[1:]:
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(write, 1)
        sys.argv = [path, "--help"]
        sys.path.insert(0, os.path.dirname(path))
        code = 1
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    with open(read) as text:
        said[path] = text.read()
    _, status = os.wait()
    assert status == 0, path
json.dump(said, sys.stdout)
"""


def test_every_script_explains_itself():
    command = [sys.executable, "-c", EXPLAIN, *map(str, PATHS.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = {name: json.loads(done.stdout)[str(path)] for name, path in PATHS.items()}
    for name, text in said.items():
        assert name == "demo_rank" or "Example" in text, name
    for earlier, name in MOVED.items():
        assert said[earlier] == said[name]


@pytest.mark.parametrize("name", SMALLEST)
def test_runs_at_its_smallest_size(name):
    options, ranks, printed = SMALLEST[name]
    done = start(name, *options, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert printed in done.stdout


def test_every_script_of_the_readme_is_run():
    """A new script is in the table of the README, and here or in the test that is named."""
    page = (ROOT / "README.md").read_text("utf-8")
    table = page.split("\n## Commands and scripts\n")[1].split("\n## ")[0]
    rows = re.findall(
        r"^\| `(.*?(?:scripts/(?:\w+/)?(\w+)\.py|seqpar (\w+)).*?)` \|", table, re.MULTILINE
    )
    commands = {script or command: row for row, script, command in rows}
    assert len(rows) == table.count("\n| `")
    assert sorted(commands) == sorted([*SMALLEST, *ELSEWHERE])
    files = {name for name in PATHS if not name.startswith("demo")}
    assert files - set(SAME) == set(commands) - {"doctor", "check", "bench"}
    for name, (_, ranks, _) in SMALLEST.items():
        assert commands[name].startswith("torchrun") == (ranks is not None), name
    for name, test in ELSEWHERE.items():
        body = (ROOT / "tests" / test).read_text("utf-8").replace(f'"{name}": "{test}"', "")
        assert re.search(rf"\b{name}\b", body), f"{test} does not run {name}"
