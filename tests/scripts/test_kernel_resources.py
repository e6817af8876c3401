"""The kernels compile ahead of time for devices that are not here, and what does not fit is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ahead_of_time.cases import Case
from ahead_of_time.outcomes import Outcome, judge, mixed_descriptors

SCRIPT = Path(__file__).parents[2] / "scripts" / "measure" / "kernel_resources.py"


@pytest.fixture
def start(tmp_path):
    def run(*options, **environment):
        kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment = kept | {"TRITON_CACHE_DIR": str(tmp_path / "cache")} | environment
        command = [sys.executable, SCRIPT, "--json", tmp_path / "x.json", *map(str, options)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, env=environment
        )
        file = tmp_path / "x.json"
        return done, json.loads(file.read_text()) if file.exists() else None

    return run


def test_the_table_compiles_for_nvidia_and_amd_without_spills(start):
    done, outcomes = start("--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    cases = {(o["case"]["target"], o["case"]["kernel"]) for o in outcomes}
    assert cases == {(t, k) for t in ("sm_90", "gfx942") for k in ("forward", "dq", "dkdv")}
    for outcome in outcomes:
        assert outcome["registers"] > 0
        assert outcome["spill_bytes"] == 0
        assert 0 < outcome["shared_bytes"] <= outcome["shared_limit_bytes"]


@pytest.mark.parametrize(
    ("tiles", "problems"),
    [
        pytest.param((128, 128, 4, 4), ["bytes of shared memory", "spills"], id="too large"),
        pytest.param((48, 64, 4, 2), ["does not compile"], id="not a power of two"),
    ],
)
def test_tiles_that_do_not_fit_fail(start, tiles, problems):
    one = ["--quick", "--targets", "sm_90", "--kernels", "forward"]
    done, (outcome,) = start(*one, "--tiles", *tiles)
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(outcome["problems"]) == len(problems)
    for found, problem in zip(outcome["problems"], problems, strict=True):
        assert problem in found
        assert found in done.stderr


def test_the_interpreter_compiles_nothing(start):
    done, outcomes = start("--quick", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "TRITON_INTERPRET must not be set" in done.stderr
    assert outcomes is None


def test_descriptors_of_several_swizzles_of_one_address_are_a_problem():
    """As in a kernel whose products read other memory on an H100."""
    one = "or.b64 \t%rd1, %rd159, -9223371899415822336;\nadd.s64 %rd2, %rd159, -9223371899415822334;\n"
    other = "or.b64 \t%rd3, %rd159, -4611685949707911168;\n"
    elsewhere = other.replace("rd159", "rd160")
    widest = "or.b64 \t%rd6, %rd159, 4611686293305294848;\n"  # 0x4000004000000000
    small = "add.s64 %rd4, %rd159, -64;\nadd.s64 %rd5, %rd159, 4096;\n"
    assert mixed_descriptors(one + elsewhere + small) == 0
    assert mixed_descriptors(one + other + small) == 1
    assert mixed_descriptors(one + widest + small) == 1
    assert mixed_descriptors(widest + small) == 0
    case = Case("sm_90", "forward", "bfloat16", 24, "causal", "plain", (128, 128, 8, 3), 4096)
    outcome = Outcome(case, ["causal"], mixed_descriptors=1)
    judge(outcome)
    assert outcome.problems == ["makes descriptors of several swizzles of 1 addresses"]
