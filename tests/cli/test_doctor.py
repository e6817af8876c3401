"""`seqpar doctor` as its users start it, and what it does when two ranks get it wrong."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import seqpar.strategies.loop
from seqpar import cli, doctor
from seqpar.strategies import STRATEGIES
from seqpar.testing import WorldError
from seqpar_kernels import IMPLEMENTATIONS

WORLDS = ["threads on cpu", "processes on cpu (gloo)"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "doctor.json"
    command = [sys.executable, "-m", "seqpar", "doctor", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads(path.read_text())


def test_says_versions_and_devices(run):
    text, found = run
    assert found["versions"]["torch"] == torch.__version__
    assert f"torch       {torch.__version__}" in text
    assert found["devices"][0]["kind"] == "cpu"
    assert found["devices"][0]["threads"] >= 1


def test_names_one_implementation_for_each_call_and_why_not_the_others(run):
    text, found = run
    kinds = {device["kind"] for device in found["devices"]}
    assert len(found["choices"]) == len(kinds) * 4 * len(doctor.FEATURES)
    for choice in found["choices"]:
        assert choice["implementation"] in IMPLEMENTATIONS
        assert set(choice["why_not"]) == set(IMPLEMENTATIONS) - {choice["implementation"]}
        assert all(choice["why_not"].values())
    by_call = {(c["device"], c["dtype"], c["feature"]): c for c in found["choices"]}
    assert by_call["cpu", "float64", "plain"]["implementation"] == "aten"
    assert by_call["cpu", "float64", "plain"]["why_not"]["reference"] == "can, but aten comes first"
    assert by_call["cpu", "float16", "softcap"]["why_not"]["aten"] == "has no softcap"
    assert "aten        has no softcap [softcap]" in text
    assert "flash_attn  does not run on cpu [always]" in text


def test_checks_every_strategy_over_threads_and_processes(run):
    text, found = run
    checks = [c for c in found["selfcheck"] if c["world"] in WORLDS]
    wanted = [
        (world, strategy, dtype)
        for world in WORLDS
        for strategy in STRATEGIES
        for dtype in ("float64", "bfloat16")
    ]
    assert [(c["world"], c["strategy"], c["dtype"]) for c in checks] == wanted
    assert all(c["failures"] == [] and 0 <= c["share"] <= 1 for c in found["selfcheck"])
    assert text.count(" ok, largest error ") == len(found["selfcheck"])


def test_imports_nothing_optional():
    optional = ["triton", "flash_attn", "rich", "hypothesis", "matplotlib"]
    code = (
        "import sys; from seqpar.cli import main; main(['doctor', '--no-selfcheck']); "
        f"found = [m for m in {optional} if m in sys.modules]; assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Self-check" not in done.stdout


def test_a_wrong_result_exits_with_1_and_says_which(monkeypatch, capsys, tmp_path):
    """Only threads see the planted bug: processes import the module anew."""

    def without_scale(q, k, v, block, **options):
        attend(q * 2, k, v, block, **options)

    attend = seqpar.strategies.loop.attend
    monkeypatch.setattr(seqpar.strategies.loop, "attend", without_scale)
    assert cli.main(["doctor", "--json", str(tmp_path / "x.json")]) == 1
    text = capsys.readouterr().out
    assert "rank 0: out off by" in text
    assert "8 of 32 self-checks FAILED" in text
    found = json.loads((tmp_path / "x.json").read_text())["selfcheck"]
    failed = [(c["world"], c["strategy"]) for c in found if c["failures"]]
    blockwise = ["ring", "allgather", "mesh", "hybrid"]
    assert failed == [("threads on cpu", name) for name in blockwise for _ in range(2)]


def test_a_world_that_does_not_start_exits_with_1_and_says_why(monkeypatch, capsys):
    def refuse(_):
        raise WorldError("no process may be started here")

    monkeypatch.setattr(doctor, "ProcessWorld", refuse)
    assert cli.main(["doctor"]) == 1
    assert "WorldError: no process may be started here" in capsys.readouterr().out


def test_a_gpu_gets_a_table_of_its_own(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    machine = doctor.examine()
    text = list(doctor.described(machine))
    assert "  cuda:0      NVIDIA H200, capability 9.0, 139 GiB" in text
    chosen = {(c.dtype, c.feature): c.implementation for c in machine.choices if c.device == "cuda"}
    assert chosen["bfloat16", "ALiBi"] == "triton"
    assert chosen["bfloat16", "head dim 512"] == "reference"
    assert chosen["float64", "plain"] == "reference"


def test_every_call_is_either_refused_or_passed_over():
    """The text leaves nothing out: the calls of its phrases are those of the data."""
    held = [("float64", "plain"), ("float32", "plain"), ("float64", "softcap")]
    assert list(doctor._summary(held)) == ["plain in float64, float32", "softcap in float64"]
    everywhere = [(str(d).removeprefix("torch."), "ALiBi") for d in doctor.DTYPES]
    assert list(doctor._summary(everywhere)) == ["ALiBi"]
    assert list(doctor._summary([("float64", f) for f in doctor.FEATURES])) == ["float64"]
