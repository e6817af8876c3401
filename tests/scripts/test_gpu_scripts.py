"""The scripts for a GPU as far as a machine without one can run them: parts, time limits, refusals, calls."""

import json
import subprocess
import sys
import time
from pathlib import Path

import gpu_calls
import gpu_day
import pytest
import torch
from gpu_day import PARTS, Part, run

from seqpar import Group, Mask

MEASURE = Path(gpu_calls.__file__).parent
CPU = torch.device("cpu")


def started(script, *options):
    return subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize("name", ["gpu_calls", "gpu_launches"])
def test_refuses_without_a_gpu(name):
    done = started(MEASURE / f"{name}.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}.py needs a CUDA GPU, and torch sees none here.\n"


def test_launches_run_on_a_cpu_too():
    options = ("--device", "cpu", "--implementation", "reference", "--tokens", "40", "--d", "16")
    done = started(MEASURE / "gpu_launches.py", *options, "--documents", "3", "--window", "9")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "reference: 40 tokens, all finite\n"


def test_a_part_that_fails_or_takes_too_long_costs_only_itself(tmp_path):
    ends = {
        "fine": ("{python} -c \"print('here')\"", "ok"),
        "wrong": ("{python} -c 'raise SystemExit(3)'", "exit status 3"),
        "slow": ("{python} -c 'import time; time.sleep(60)'", "took too long"),
        "absent": ("no-such-profiler --all", "no-such-profiler is not here"),
    }
    began = time.monotonic()
    for name, (command, status) in ends.items():
        outcome = run(Part(name, 3, [command]), tmp_path)
        assert (outcome.part, outcome.status) == (name, status)
    assert time.monotonic() - began < 40
    assert (tmp_path / "fine_0_0.log").read_text() == "here\n"


def test_commands_of_a_part_run_at_once_or_in_turn(tmp_path):
    sleep = "{python} -c 'import time; time.sleep(1.5)'"
    at_once = run(Part("together", 30, [sleep] * 3, at_once=True), tmp_path)
    in_turn = run(Part("in_turn", 30, [sleep] * 3), tmp_path)
    assert (at_once.status, in_turn.status) == ("ok", "ok")
    assert in_turn.seconds > 4.4
    assert at_once.seconds < in_turn.seconds
    late = run(Part("late", 1, [sleep, sleep]), tmp_path)
    assert late.status in ("took too long; no time left", "took too long")


def test_the_day_writes_how_each_part_ended(tmp_path, monkeypatch, capsys):
    parts = Part("a", 9, ["{python} -c 1"]), Part("b", 9, ["{python} -c 'raise SystemExit(1)'"])
    monkeypatch.setattr(gpu_day, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--out", str(tmp_path / "day")])
    with pytest.raises(SystemExit):
        gpu_day.main()
    told = json.loads((tmp_path / "day" / "day.json").read_text())
    assert [(p["part"], p["status"]) for p in told] == [("a", "ok"), ("b", "exit status 1")]
    assert capsys.readouterr().out.count("\n") == 2


def test_every_command_of_the_day_names_a_script_that_is_here():
    """And options that it has: all but those of the tools around it."""
    for part in PARTS:
        for command in part.commands:
            words = command.split()
            scripts = [w for w in words if w.endswith(".py")]
            assert all((gpu_day.ROOT / w).is_file() for w in scripts), command
            folders = [w for w in words if w.startswith("tests/")]
            assert all((gpu_day.ROOT / w).is_dir() for w in folders), command
    assert sum(part.seconds for part in PARTS) < 25 * 60


def test_calls_that_are_measured_agree():
    *leaves, _ = (x.float().detach() for x in gpu_calls.tensors(64, CPU))
    found = {
        name: attend(*leaves)
        for name, attend in gpu_calls.attentions(64).items()
        if name.endswith(("torch", "by default"))
    }
    assert list(found) == ["torch", "ulysses by default", "ring by default"]
    for out in found.values():
        torch.testing.assert_close(out, found["torch"], rtol=0, atol=1e-5)


def test_what_cannot_be_measured_says_why():
    assert "error" in gpu_calls.captured("ring", CPU)
    plan = gpu_calls.plan_of(Group.alone(), 64, "mesh", Mask(), None)
    assert plan.grid is not None


def test_what_differs_is_told_by_name():
    want = [torch.zeros(3), torch.ones(3), torch.ones(3)]
    got = [torch.tensor([0.0, 0.25, -0.5]), torch.ones(3), torch.ones(3)]
    assert gpu_calls.off_by(got, want) == {"dq": 0.5, "dk": 0.0, "dv": 0.0}
