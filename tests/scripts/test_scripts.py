"""The scripts as their users start them, small; and training, which must not depend on P."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_bytes
from train_bytes import Recipe

import seqpar

SCRIPTS = Path(__file__).parents[2] / "scripts"
TEXT = torch.arange(4000).mul(7919).remainder(251).to(torch.uint8)
SMALL = {"length": 61, "batch": 2, "dim": 32, "heads": 4, "kv_heads": 2, "layers": 2, "steps": 20}


def start(script, *options, ranks=None):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks else []), SCRIPTS / script, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def losses(size, **options):
    recipe = Recipe(**(SMALL | options))
    return seqpar.simulate(size, train_bytes.train, recipe, TEXT)


@pytest.mark.parametrize(
    ("size", "strategy", "layout"),
    [
        (2, "ring", "zigzag"),
        (3, "ring", "striped"),
        (3, "ulysses", "contiguous"),
        (5, "ulysses", "zigzag"),
    ],
)
def test_losses_do_not_depend_on_the_ranks(size, strategy, layout):
    """Measured 1.5e-7; a gradient that is 1 % wrong shows as 5e-6, so 1e-6 and not 1e-5."""
    one = torch.tensor(losses(1)[0], dtype=torch.float64)
    for got in losses(size, strategy=strategy, layout=layout):
        relative = (torch.tensor(got, dtype=torch.float64) - one).abs() / one
        assert relative.max() < 1e-6
    assert one[-1] < one[0]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    checkpoint = tmp_path / "run.pt"
    whole = losses(1)[0]

    def first(group):
        recipe = Recipe(**(SMALL | {"steps": 7}))
        return train_bytes.train(group, recipe, TEXT, checkpoint=checkpoint)

    def second(group):
        recipe = Recipe(**SMALL)
        return train_bytes.train(group, recipe, TEXT, checkpoint=checkpoint, resume=True)

    seqpar.simulate(1, first)
    saved = checkpoint.read_bytes()
    assert seqpar.simulate(1, second)[0] == whole
    checkpoint.write_bytes(saved)
    for got in seqpar.simulate(3, second):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(whole), rtol=1e-6, atol=0)

    def other(group):
        recipe = Recipe(**(SMALL | {"lr": 0.5}))
        train_bytes.train(group, recipe, TEXT, checkpoint=checkpoint, resume=True)

    with pytest.raises(ValueError, match=r"lr is 0\.001 there and 0\.5 here"):
        seqpar.simulate(2, other)


def test_a_missing_checkpoint_is_an_error_on_every_rank(tmp_path):
    def fn(group):
        path = tmp_path / f"only-{group.rank}"
        if group.rank == 0:
            train_bytes.train(
                seqpar.Group.alone(), Recipe(**(SMALL | {"steps": 1})), TEXT, checkpoint=path
            )
        with pytest.raises((FileNotFoundError, seqpar.DesyncError)) as caught:
            train_bytes.train(group, Recipe(**SMALL), TEXT, checkpoint=path, resume=True)
        return str(caught.value)

    assert all("there is no checkpoint" in message for message in seqpar.simulate(2, fn))


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
