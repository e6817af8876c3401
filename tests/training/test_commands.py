"""The training scripts as they are started, and how the longest context is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import longest_context
import pytest
from training_runs import ways

SCRIPTS = Path(__file__).parents[2] / "scripts" / "train"
SMALL = ["--length", 40, "--dim", 32, "--max-bytes", 5000, "--warmup", 2]


def start(*options, ranks=None):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    script = [SCRIPTS / "byte_level.py", *SMALL, *options]
    command = [sys.executable, *(torchrun if ranks else []), *map(str, script)]
    environment = os.environ | {"SEQPAR_CHECK_SHAPES": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_sharded_run_under_torchrun_is_resumed_without_it(tmp_path):
    saving = ["--checkpoint", tmp_path / "run", "--metrics", tmp_path / "metrics.jsonl"]
    options = ["--fsdp", "--autocast", "bfloat16", "--checkpointing", "full", "--loss-tile", 16]
    done = start(*options, *saving, "--steps", 2, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 steps, loss" in done.stdout
    options = ["--autocast", "bfloat16", "--resume", "--json", tmp_path / "run.json"]
    done = start(*options, *saving, "--steps", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(min(line["grad_norm"], line["tokens_per_second"]) > 0 for line in lines)
    result = json.loads((tmp_path / "run.json").read_text())
    assert result["losses"] == [line["loss"] for line in lines]


def test_what_cannot_be_is_said_in_a_line(tmp_path):
    done = start("--resume", "--checkpoint", tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert done.stderr.endswith(f"error: there is no checkpoint in {tmp_path} to resume from\n")


def memory(start, slope, curve=0.0):
    """A fake run whose peak is start + slope n + curve n^2."""
    lengths = []

    def measure(length):
        lengths.append(length)
        return {"length": length, "peak_bytes": start + slope * length + curve * length**2}

    return measure, lengths


@pytest.mark.parametrize(("start", "slope", "curve"), [(100, 3, 0), (0, 7, 1e-3), (9, 2, 2e-4)])
def test_the_longest_context_has_run_within_the_limit_and_fills_it(start, slope, curve):
    measure, lengths = memory(start, slope, curve)
    found = longest_context.longest(measure, [100, 200], 10_000, 8)
    best = found["longest"]
    assert best["length"] in lengths
    assert best["length"] % 8 == 0 or best["length"] in (100, 200)
    assert 8_500 < best["peak_bytes"] <= 10_000


def test_limits_that_nothing_fits_are_an_error():
    with pytest.raises(ValueError, match="no length fits"):
        longest_context.longest(memory(20_000, 3)[0], [100, 200], 10_000, 8)
    with pytest.raises(ValueError, match="must grow"):
        longest_context.longest(memory(100, 0)[0], [100, 200], 10_000, 8)


def test_every_way_of_training_is_compared_with_one_process():
    runs = ways([1, 2, 4])
    assert runs[0] == ("", 1, [])
    assert {ranks for _, ranks, _ in runs} == {1, 2, 4}
    assert ["--dp", "2", "--fsdp"] in [options for *_, options in runs]
