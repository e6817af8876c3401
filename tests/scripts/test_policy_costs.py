"""The comparison of policies, tiny: complete records, the closed forms, and that it fails when it should."""

import json
import sys

import policy_costs
import pytest
import two_policies
from gemma_policies.measured import JOBS
from gemma_policies.projection import all_projections
from gemma_policies.rows_and_sheets import failures
from policy_pictures.crossover import POLICIES as DRAWN
from policy_pictures.crossover import ratio

from seqpar.tensor_parallel import Sizes

POLICIES = ["one process", "Megatron", "contracted", "sharded weights", "Megatron, o_proj swapped"]


def test_only_the_swapped_axis_fails_and_only_by_its_volume(monkeypatch, tmp_path):
    paths = {name: tmp_path / f"x.{name}" for name in ("json", "markdown", "plot")}
    paths["plot"] = paths["plot"].with_suffix(".png")
    options = [x for name, path in paths.items() for x in (f"--{name}", str(path))]
    command = ["policy_costs.py", "--quick", "--ranks", "2", "--swap", "o_proj", *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        policy_costs.main()
    (message,) = str(stopped.value).splitlines()
    assert message == "P=2, Megatron, o_proj swapped: counted elements differ from the closed form"

    found = json.loads(paths["json"].read_text())
    assert found["failures"] == [message]
    rows = {row["policy"]: row for row in found["rows"]}
    assert list(rows) == POLICIES
    for name, row in rows.items():
        assert row["counted_is_formula"] == ("swapped" not in name)
        assert row["differences"].pop("tokens") == 0
        assert max(row["differences"].values()) < 5e-6
        assert set(row["ms"]) == {*JOBS, "forward 1", "forward 8"}
        assert all(row["held_bytes"].values())
    for job in JOBS:  # the axis is all that differs: what is sent, not what comes out
        sent, more = (
            sum(rows[name]["jobs"][job]["counted"][0].values()) for name in POLICIES[1::3]
        )
        assert more > sent
    halves = [rows[name]["held_bytes"]["weights"] for name in POLICIES[1:4]]
    assert max(halves) < 0.51 * rows["one process"]["held_bytes"]["weights"]
    assert len(found["projections"]) == 2 * 2 * len(all_projections())
    assert all(p["counted"] == p["formula"] for p in found["projections"])
    assert "| 2 | contracted |" in paths["markdown"].read_text()
    assert paths["plot"].stat().st_size > 10_000


def test_other_numbers_than_one_process_fail():
    row = {"ranks": 2, "policy": "Megatron", "counted_is_formula": True}
    right = {"logits": 1e-7, "tokens": 0.0, "losses, full step": 1e-9}
    assert failures([{**row, "differences": right}], []) == []
    for name, difference in (
        ("logits", 1e-5),
        ("tokens", 1e-9),
        ("losses, full step", float("nan")),
    ):
        (message,) = failures([{**row, "differences": right | {name: difference}}], [])
        assert message == f"P=2, Megatron: {name} differ from one process by {difference:.1e}"


def test_a_projection_that_sends_other_than_its_formula_fails():
    one = {
        "inputs": 12,
        "outputs": 24,
        "arrives": "part",
        "wanted": "whole",
        "by": "input",
        "ranks": 2,
    }
    (message,) = failures([], [{**one, "counted": [24.0, 0.0], "formula": [24.0, 12.0]}])
    assert (
        message
        == "P=2, 12 to 24 by input, x part, y whole: counted [24.0, 0.0], formula [24.0, 12.0]"
    )


def test_by_input_sends_less_below_the_shapes_that_the_page_names():
    crossover = {
        ("part", "whole"): 2,
        ("part", "part"): 1,
        ("whole", "whole"): 1,
        ("whole", "part"): 1 / 2,
    }
    for held, at in crossover.items():
        assert ratio(at, 1, *held) == 1
        assert ratio(0.9 * at, 1, *held) < 1 < ratio(1.1 * at, 1, *held)


def test_tokens_at_which_sharded_weights_send_as_much_are_those_of_the_page():
    D, layer = 3072, {"num_heads": 16, "num_kv_heads": 16, "head_dim": 256, "mlp": 24576}
    weights = 4 * D * 16 * 256 + 3 * D * 24576
    for name, tokens in (("Megatron", 33792), ("contracted", 4608)):
        volume = DRAWN[name][1](Sizes(tokens, D, **layer, vocabulary=256_000), 8)
        assert sum(volume.sent("layers")) == 3 * weights * 7 / 8


def test_both_pictures_are_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["two_policies.py", str(tmp_path)])
    two_policies.main()
    for name in ("tp_policies.png", "tp_crossover.png"):
        assert (tmp_path / name).stat().st_size > 30_000
