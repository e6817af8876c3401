"""`seqpar check` as its users start it, and what it does when something is off."""

import functools
import json

import pytest

import seqpar.strategies.loop
from seqpar import cli, simulate
from seqpar.commands import check
from seqpar.testing import TorchrunWorld, WorldError


class Threads:
    """Two ranks as threads in the place of processes, so that a planted bug is theirs too."""

    size = 2

    def __init__(self, size):
        assert size == self.size

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, fn, *args, timeout):
        assert timeout > 0
        return simulate(self.size, fn, *args)


def test_starts_its_own_processes_and_writes_what_it_found(capsys, tmp_path):
    path = tmp_path / "x.json"
    options = ["--ranks", "2", "--dtype", "bfloat16", "--strategy", "hybrid", "--json", str(path)]
    assert cli.main(["check", *options]) == 0
    text = capsys.readouterr().out
    assert text.endswith("P=2: 21 cases, 0 failures\n")
    found = json.loads(path.read_text())
    assert found["ranks"] == 2
    assert sum(record["cases"] for record in found["records"]) == 21
    assert len(found["records"]) == len(text.splitlines()) - 3
    assert all(0 < max(record["worst"].values()) <= 1 for record in found["records"])


def _with_another_q(attend, q, *others, **options):
    return attend(q * 2, *others, **options)


def test_a_wrong_result_exits_with_1_and_names_the_case(monkeypatch, capsys):
    for name in ("attend", "begin"):
        right = getattr(seqpar.strategies.loop, name)
        wrong = functools.partial(_with_another_q, right)
        monkeypatch.setattr(seqpar.strategies.loop, name, wrong)
    monkeypatch.setattr(check, "ProcessWorld", Threads)
    options = ["--ranks", "2", "--dtype", "float32", "--strategy", "mesh"]
    assert cli.main(["check", *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert failed[0].startswith("FAILED mesh, full: Case(length=97, hq=4, hkv=4, ")
    assert "rank 0: out off by" in failed[0]
    assert lines[-1] == f"P=2: 21 cases, {len(failed)} failures"


def test_a_rank_that_dies_exits_with_1_and_is_named(monkeypatch, capsys):
    def die(*_, **__):
        raise WorldError("rank 1: rank 1 died")

    monkeypatch.setattr(Threads, "run", die)
    monkeypatch.setattr(check, "ProcessWorld", Threads)
    assert cli.main(["check", "--ranks", "2"]) == 1
    assert capsys.readouterr().out.endswith("FAILED rank 1: rank 1 died\n")


@pytest.mark.parametrize("command", [["check", "--ranks", "2"], ["bench"]], ids=["check", "bench"])
def test_under_torchrun_a_command_does_not_start_processes_too(monkeypatch, capsys, command):
    monkeypatch.setattr(TorchrunWorld, "is_here", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert "torchrun" in capsys.readouterr().err.splitlines()[-1]


def test_without_torchrun_its_world_says_so():
    with pytest.raises(RuntimeError, match="torchrun did not start this process"):
        TorchrunWorld()


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_number_of_ranks_is_at_least_1(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["check", "--ranks", text])
    assert f"must be an integer of at least 1, got '{text}'" in capsys.readouterr().err
