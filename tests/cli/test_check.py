"""`seqpar check` and `seqpar bench` as their users start them, and what they do when something is off."""

import json
from dataclasses import replace

import pytest

import seqpar.strategies.loop
from seqpar import cli, simulate
from seqpar.commands import bench, check
from seqpar.commands.contest import Row
from seqpar.testing import TorchrunWorld, WorldError

ROWS = [
    Row("one device", "", 2.0, 1.0, 1.0, 0, 0, None, [2.0]),
    Row("ring", "zigzag", 1.0, 0.5, 0.5, 4_000_000, 4_000_000, 5_000_000, [1.0]),
]


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


def test_a_wrong_result_exits_with_1_and_names_the_case(monkeypatch, capsys):
    def without_scale(q, k, v, block, **options):
        attend(q * 2, k, v, block, **options)

    attend = seqpar.strategies.loop.attend
    monkeypatch.setattr(seqpar.strategies.loop, "attend", without_scale)
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


def test_a_bench_is_a_table_with_what_could_not_be_read_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bench, "contest", lambda *_: ROWS)
    assert cli.main(["bench", "--length", "64", "--dtype", "float32", "--rounds", "1"]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == "N=64 float32 causal, 8 heads of 64, P=2, forward + backward, median of 1"
    assert header.split("  ")[-1].strip() == "peak MB"
    assert rows[0].split() == ["one", "device", "2000.0", "1.000", "0.000", "0.000", "-"]
    assert rows[1].split() == ["ring", "zigzag", "1000.0", "0.500", "4.000", "4.000", "5.0"]


def test_a_bench_fails_where_bytes_are_not_those_of_the_dry_run(monkeypatch, capsys):
    off = [ROWS[0], replace(ROWS[1], derived_bytes=1)]
    monkeypatch.setattr(bench, "contest", lambda *_: off)
    assert cli.main(["bench", "--length", "64", "--dtype", "float32"]) == 1
    assert "differ from the dry run: ring at N=64 float32" in capsys.readouterr().out
