"""The numerics script, small: what it writes, that it fails when it should, and its emulated rings."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import exactness
import pytest
import torch
from exact_results.bits import difference
from exact_results.errors import METRICS, errors
from exact_results.gathered import STRATEGIES, run
from exact_results.rings16 import ROUNDING, rounding_ring

from seqpar.testing import NAMES, Case, oracle

SCRIPT = Path(exactness.__file__)
SMALL = Case(128, 4, 2, d=8, vd=8, dtype=torch.bfloat16)
EXACT = oracle.with_gradients(
    *(x.double() for x in SMALL.tensors()), oracle.visible(128, True, None), SMALL.terms()
)


def test_writes_both_tables(tmp_path):
    options = ["--length", 128, "--heads", 4, "--kv-heads", 2, "--d", 8, "--ranks", 1, 2, 3]
    options += ["--bits-length", 128, "--bits-ranks", 3, "--date", "2000-01-02"]
    command = [sys.executable, SCRIPT, *map(str, options), "--json", tmp_path / "x.json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"SEQPAR_CHECK_SHAPES": "0"},  # they are checked elsewhere, and take twice as long
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["date"] == "2000-01-02"
    assert found["versions"]["torch"] == torch.__version__
    assert found["failures"] == []
    assert {r["ranks"] for r in found["errors"]} == {1, 2, 3}
    assert {r["name"] for r in found["errors"]} == {*STRATEGIES, *ROUNDING}
    for r in found["errors"]:
        for metric in METRICS:
            assert set(r[metric]) == set(NAMES)
            assert all(1e-4 < x < 3e-2 for x in r[metric].values())
    promised = [r for r in found["bits"] if r["promised"]]
    assert {r["strategy"] for r in promised} == {"ring", "ulysses", "allgather"}
    for r in promised:
        for by_name in r["differences"].values():
            assert all(x["equal"] and x["differ"] == 0 for x in by_name.values())
    others = [x for r in found["bits"] if not r["promised"] for x in r["differences"].values()]
    assert any(x["differ"] for by_name in others for x in by_name.values())


@pytest.mark.parametrize("name", ROUNDING)
def test_emulated_rings_of_one_rank_are_ours(name):
    """Nothing is merged, so they round as we do: once, at the end."""
    case = replace(SMALL, kind="zigzag")
    ours = run(1, case, "ring", "reference")
    theirs = rounding_ring(case, case.layout(1), "reference", ROUNDING[name])
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def test_emulated_rings_are_attention_and_round_in_between():
    case = replace(SMALL, kind="zigzag")
    typical = {}
    for name, kept in ROUNDING.items():
        got = rounding_ring(case, case.layout(4), "reference", kept)
        typical[name] = errors(got, EXACT)["typical"]
    ours = errors(run(4, case, "ring", "reference"), EXACT)["typical"]
    for name in NAMES:
        assert ours[name] < typical["16-bit blocks"][name] < typical["16-bit sums"][name] < 1e-2


def test_growth_and_broken_promises_are_failures():
    def record(ranks, typical, largest, implementation="reference", ours=True):
        by_name = {"typical": {"dq": typical}, "largest": {"dq": largest}}
        return {
            "name": "ring", "implementation": implementation, "ranks": ranks, "ours": ours, **by_name
        }  # fmt: skip

    def check(*args, **options):
        return exactness.grown([record(1, 0.01, 0.01, **options), record(8, *args, **options)])

    assert check(0.014, 0.014) == []
    (failure,) = check(0.016, 0.014)
    assert failure.startswith("ring (reference), P = 8: typical error of dq is 1.60e-02, at P = 1")
    assert "largest error of dq" in check(0.014, 0.016)[0]
    assert check(0.014, 0.016, implementation="aten") == []
    assert len(check(0.016, 0.016, implementation="aten")) == 1
    assert len(check(float("nan"), 0.01)) == 1
    assert check(0.016, 0.016, ours=False) == []

    found = difference(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 4.0 - 2**-21]))
    assert found == {"equal": False, "elements": 2, "differ": 1, "steps": 1.0}
    bits = {
        "strategy": "ring", "layout": "zigzag", "implementation": "reference", "dtype": "float32",
        "differences": {"3": {"dv": found}},
    }  # fmt: skip
    assert exactness.broken([bits | {"promised": False}]) == []
    assert exactness.broken([bits | {"promised": True}]) == [
        "ring, zigzag, reference, float32: dv differs with 3 ranks"
    ]
