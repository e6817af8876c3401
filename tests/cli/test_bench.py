"""`seqpar bench`: what it prints, what it refuses to time, and when it fails."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from seqpar import Group, cli, simulate
from seqpar.commands import bench, contest, load, steps
from seqpar.commands.contest import Outcome, Row
from seqpar.commands.load import Load
from seqpar.commands.peers import PEERS, one_device, ring_flash

ROWS = [
    Row("one device", "", 2.0, 1.0, (1.0, 1.0), 1.0, None, None, None, 0.0, [2.0]),
    Row("ring", "zigzag", 1.0, 0.5, (0.4, 0.6), 0.5, 4_000_000, 4_000_000, 5_000_000, 1e-7, [1.0]),
]
OUTCOME = Outcome(ROWS, {"torch cp": "it wants a length that 4 divides"}, 0.25)
SMALL = ["bench", "--length", "64", "--dtype", "float32", "--rounds", "2", "--strategies"]


def _words(line):
    return " ".join(line.split())


def test_it_is_a_table_with_what_is_not_known_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bench, "contest", lambda *_: OUTCOME)
    assert cli.main(["bench", "--length", "64", "--dtype", "float32", "--rounds", "1"]) == 0
    title, header, one, ring, peer, load_line = capsys.readouterr().out.splitlines()
    assert title == "N=64 float32 causal, 8 heads of 64, P=2, forward + backward, median of 1"
    assert _words(header) == "layout ms ratio quartiles sent MB derived MB peak MB error"
    assert _words(one) == "one device 2000.0 1.000 1.000-1.000 - - - 0.0e+00"
    assert _words(ring) == "ring zigzag 1000.0 0.500 0.400-0.600 4.000 4.000 5.0 1.0e-07"
    assert peer.strip() == "torch cp            not timed: it wants a length that 4 divides"
    assert load_line.strip() == "other processes used 25% of the machine's CPUs meanwhile"


def test_it_fails_where_bytes_are_not_those_of_the_dry_run(monkeypatch, capsys):
    off = replace(OUTCOME, rows=[ROWS[0], replace(ROWS[1], derived_bytes=1)])
    monkeypatch.setattr(bench, "contest", lambda *_: off)
    assert cli.main([*SMALL, "ring"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "FAILED ring: counted bytes differ from the dry run, N=64 float32"


def test_every_result_is_checked_and_timed_in_both_passes(tmp_path, capsys):
    path = tmp_path / "x.json"
    options = ["ring", "--peers", "torch cp", "--passes", "forward", "both", "--json", str(path)]
    assert cli.main(SMALL + options) == 0
    assert "P=2, forward alone, median of 2" in capsys.readouterr().out
    for found, sums in zip(json.loads(path.read_text()), (1, 3), strict=True):
        assert [row["name"] for row in found["rows"]] == ["one device", "ring", "torch cp"]
        one, ring, peer = found["rows"]
        assert len(peer["seconds"]) == 2
        assert 0 < peer["error"] < 1e-5
        assert peer["sent_bytes"] is None
        # Rank 0 sends k and v of 32 rows, rank 1 all of its own; sums are as many bytes, but none of q.
        assert ring["sent_bytes"] == sums * 2 * 2 * 32 * 8 * 64 * 4
        assert ring["quartiles"][0] <= ring["ratio"] <= ring["quartiles"][1]
        assert one["ratio"] == 1
        assert found["refused"] == {}
        assert 0 <= found["others"] <= 1


def test_a_wrong_result_is_named_and_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(contest, "ALLOWED", {torch.float32: 1e-12})
    assert cli.main([*SMALL, "ring", "--peers", "torch cp"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["layout", "one", "ring"]
    assert "torch cp            not timed: WRONG: out is off by " in lines[4]
    assert lines[-1].startswith("FAILED ring: WRONG: out is off by ")


@pytest.mark.skipif(PEERS["yunchang ulysses"].is_installed, reason="yunchang is here")
def test_a_peer_that_fails_is_named_and_the_others_are_timed(capsys):
    assert cli.main([*SMALL, "ulysses", "--peers", "yunchang ulysses"]) == 0
    text = capsys.readouterr().out
    assert "not timed: ModuleNotFoundError: No module named 'yunchang'" in text
    assert "  ulysses  " in text


def _fail_later(group, setting, name):
    """A strategy that fails in its second round, on one rank."""
    if name == "mesh" and setting.length == 64:
        _fail_later.rounds = getattr(_fail_later, "rounds", 0) + 1
        if _fail_later.rounds == 2 and group.rank == 1:
            raise RuntimeError("it had enough")
    return steps.rank_step(group, setting, name)


def test_what_fails_in_a_round_is_named_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setattr(contest, "rank_step", _fail_later)
    assert cli.main([*SMALL, "mesh", "ulysses", "--peers"]) == 1
    text = capsys.readouterr().out
    assert "mesh                not timed: RuntimeError: it had enough" in text
    assert "FAILED mesh: RuntimeError: it had enough" in text
    assert "  ulysses             contiguous" in text


def test_nothing_is_worse_than_a_nan_and_no_rows_are_not_wrong(tmp_path):
    setting = steps.Setting(2, 1, 4, torch.float32, True, False, {"ring": "zigzag"})
    path = tmp_path / "expected"
    steps.save_expected(Group.alone(), setting, path)
    right = simulate(4, steps.rank_errors, setting, "ring", path)
    assert all(found["out"] < 1e-6 for found in right)
    assert sum(found["out"] == 0.0 for found in right) >= 2
    steps._expected(path, setting, shared=True).fill_(torch.nan)
    found = simulate(4, steps.rank_errors, setting, "ring", path)
    assert max(x["out"] for x in found) == torch.inf


def test_quartiles_are_within_what_was_measured():
    assert contest.quartiles([1.0]) == (1.0, 1.0)
    assert contest.quartiles([1.0, 2.0]) == (1.25, 1.75)
    assert contest.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("name", "length", "ranks", "causal", "why"),
    [
        ("torch cp", 66, 2, True, "it wants a length that 4 divides"),
        ("torch cp", 64, 2, False, "it wants a causal mask in this layout"),
        ("deepspeed ulysses", 66, 3, True, "it wants a number of heads that 3 divides"),
        ("deepspeed ulysses", 66, 2, False, None),
    ],
)
def test_a_peer_says_what_it_lacks(name, length, ranks, causal, why):
    assert PEERS[name].lacks(length, 8, ranks, causal) == why


def test_what_stands_in_for_flash_attn_is_attention():
    q, k, v, dout = (torch.randn(2, 12, 3, 8) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    right = one_device.attend(*leaves, causal=True, scale=0.3)
    out, lse, *_ = ring_flash._flash_attn_forward(q, k, v, softmax_scale=0.3, causal=True)
    torch.testing.assert_close(out, right)
    into = [torch.empty_like(x) for x in (q, k, v)]
    ring_flash._flash_attn_backward(
        dout, q, k, v, out, lse, *into, softmax_scale=0.3, causal=True, dropout_p=0.0
    )
    torch.testing.assert_close(into, [*torch.autograd.grad(right, leaves, dout)])
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    whole = F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.3)
    torch.testing.assert_close(right, whole.transpose(1, 2))


def test_others_are_what_is_busy_and_not_ours():
    # Of 40 CPU seconds 14 were busy, 10 of them ours.
    assert Load(114.0, 240.0).others(Load(100.0, 200.0), 10.0) == pytest.approx(0.1)
    assert Load(108.0, 240.0).others(Load(100.0, 200.0), 10.0) == 0.0
    assert Load(100.0, 200.0).others(Load(100.0, 200.0), 0.0) is None


def test_where_the_system_does_not_say_it_is_not_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(load, "PATH", tmp_path / "none")
    assert Load.now() is None
    monkeypatch.setattr(bench, "contest", lambda *_: replace(OUTCOME, others=None))
    assert cli.main([*SMALL, "ring"]) == 0
    assert "other processes" not in capsys.readouterr().out
