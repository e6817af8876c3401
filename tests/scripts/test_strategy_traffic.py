"""The traffic report, tiny: its numbers against the definition, and that it fails when it should."""

import json
import sys

import pytest
import strategy_traffic
import torch
from sent_by_strategy.routes import Way
from sent_by_strategy.textbook import textbook
from sent_by_strategy.windowed_ring import MASKS
from strategy_traffic import failures

from seqpar.calls import Shape, Volume, dry_run
from seqpar.comm import Count
from seqpar.strategies import STRATEGIES

TINY = ["--length", "64", "--d", "8", "--heads", "4", "1", "--ranks", "2", "4"]
WINDOWED = ["--window", "8", "--rows", "16", "--windowed-ranks", "2", "3", "4", "--rounds", "1"]


def start(monkeypatch, path, *options):
    command = ["strategy_traffic.py", *TINY, *WINDOWED, "--json", str(path), *options]
    monkeypatch.setattr(sys, "argv", command)
    strategy_traffic.main()
    return json.loads(path.read_text())


def test_every_part_is_reported(monkeypatch, tmp_path):
    found = start(monkeypatch, tmp_path / "x.json", "--plot", str(tmp_path / "x.png"))
    assert found["failures"] == []
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert len(found["volumes"]) == 4 * len(STRATEGIES) + 3
    assert {row["ranks"] for row in found["volumes"]} == {2}
    assert all(row["counted_is_derived"] for row in found["volumes"])
    ring = next(row for row in found["volumes"] if row["strategy"] == "ring")
    assert (
        ring["forward_bytes"] == ring["textbook_forward_bytes"] == 2 * 32 * 2 * 8
    )  # k, v of 32 rows
    assert (
        ring["textbook_backward_bytes"] - ring["backward_bytes"] == 4 * 32 * 2 * 8
    )  # the hop home

    assert [(g["ranks"], len(g["grids"])) for g in found["grids"]] == [(2, 2), (4, 3)]
    for grids in found["grids"]:
        assert grids["grids"][0]["step_bytes_of_allgather"] == 1.0
        assert min(row["step_bytes"] for row in grids["grids"]) == next(
            row["step_bytes"] for row in grids["grids"] if [row["rows"], row["columns"]] == grids["best"]
        )  # fmt: skip
    for answer in found["least"]:
        sent = [way["step_busiest_bytes"] for way in answer["ways"]]
        assert sent == sorted(sent)
        assert {"ring", "ulysses", "allgather", "mesh"} <= {w["strategy"] for w in answer["ways"]}

    points = found["windowed"]["points"]
    assert len(points) == 2 * 3 * len(MASKS)
    ring = {
        p["ranks"]: p
        for p in points
        if p["series"].startswith("rows") and "windowed ring" in p["name"]
    }
    block = 16 * 2 * 64 * 4  # k and v of 16 rows in float32; forward, backward, and sums
    assert [ring[p]["busiest_bytes"] for p in (2, 3, 4)] == [2 * block, 3 * block, 3 * block]
    assert {p["busiest_scores"] for p in ring.values()} == {16 * 8}


def test_wrong_counts_fail(monkeypatch, tmp_path):
    def more(plan, shape, rank):
        volume, extra = sent(plan, shape, rank), int(plan.strategy == "ring")
        return Volume(volume.forward + Count(extra, extra), volume.backward)

    sent = dry_run.sent
    monkeypatch.setattr(dry_run, "sent", more)
    with pytest.raises(SystemExit, match=r"ring, full contiguous, P=2: counted bytes differ"):
        start(monkeypatch, tmp_path / "x.json", "--parts", "volumes")
    assert len(json.loads((tmp_path / "x.json").read_text())["failures"]) >= 4


def test_more_than_the_textbook_fails():
    row = {
        "strategy": "ring", "name": "ring", "causal": True, "layout": "zigzag", "ranks": 4, "below": -1.0,
        "counted_is_derived": True, "forward_busiest_bytes": 11, "backward_busiest_bytes": 5,
        "textbook_forward_bytes": 10, "textbook_backward_bytes": 5,
    }  # fmt: skip
    (message,) = failures({"volumes": [row]})
    assert message == "ring, causal zigzag, P=4: forward 11 bytes, the textbook 10"


def test_a_windowed_ring_that_grows_fails():
    point = {"name": "windowed ring, contiguous", "series": "rows of a rank fixed", "length": 64,
             "counted_is_derived": True, "busiest_scores": 1}  # fmt: skip
    grows = [{**point, "ranks": p, "busiest_bytes": p} for p in (4, 8)]
    assert len(failures({"windowed": {"points": grows}})) == 1
    assert failures({"windowed": {"points": [{**p, "busiest_bytes": 1} for p in grows]}}) == []


def test_the_textbook_is_the_table():
    """32 query and 8 kv heads on 4 ranks, by hand: in bfloat16, sums in float32."""
    shape = Shape(1, 32, 8, 128, 128, torch.bfloat16)
    N, hq, hk = 1024, 32 * 128, 8 * 128
    assert textbook(Way("ring"), 4, N, shape) == (
        2 * 1.5 * N * hk,
        2 * 1.5 * N * hk + 4 * 2 * N * hk,
    )
    assert textbook(Way("ulysses"), 4, N, shape) == (2 * 3 / 16 * N * (2 * hq + 2 * hk),) * 2
    assert textbook(Way("hybrid", 2), 4, N, shape) is None
