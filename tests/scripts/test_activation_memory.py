"""The formulas of memory against every byte that is allocated; the script's failure when they are wrong.

A failure of forward, kept or backward alone says where the new or forgotten tensors are. The profiler's
record of allocations is the same on every run, so the tolerance is not for noise: at these lengths the
formulas leave out at most 3 %, work space of half-precision products and masks of window edges.
"""

import json
import subprocess
import sys
from pathlib import Path

import activation_memory
import pytest
from activation_memory import Setting, allocated_bytes, failures, formula

from seqpar import Group, Mask, Plan
from seqpar.layout import zigzag
from seqpar.strategies import Shape
from seqpar.strategies.memory import memory

SCRIPT = Path(activation_memory.__file__)
FIVE = ("ring", "ulysses", "allgather", "mesh", "hybrid")
CASES = [
    *(Setting(name, 1024) for name in FIVE),
    *(Setting(name, 1024, "striped", heads=8, kv_heads=4) for name in FIVE),
    *(Setting(name, 777, "contiguous", batch=2, d=16, vd=48) for name in FIVE),
    Setting("ring", 2048, dtype="bfloat16"),  # queries travel
    Setting("ring", 1024, dtype="float64", causal=False),
    Setting("ring", 4096, "contiguous", 8, 8, 64, 64, window=200),  # chains that end
]


def measured(group, setting):
    allocated_bytes(group, Setting(setting.strategy, 64))
    return allocated_bytes(group, setting)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("setting", CASES, ids=str)
def test_equals_what_is_allocated(worlds, size, setting):
    if size == 2 and setting.strategy in ("mesh", "hybrid"):
        pytest.skip("a grid of two ranks is one of the other strategies")
    formulas = worlds.run(size, formula, setting)
    for rank, found in enumerate(worlds.run(size, measured, setting)):
        want = formulas[rank]
        assert found.kept == want.kept_bytes, rank
        assert found.forward == pytest.approx(sum(want.forward.values()), rel=0.05), rank
        assert found.backward == pytest.approx(sum(want.backward.values()), rel=0.05), rank


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_stored_scores_are_what_dominates(worlds, name):
    setting = Setting(f"materialised_{name}", 512)
    found = worlds.run(2, measured, setting)
    for want, got in zip(worlds.run(2, formula, setting), found, strict=True):
        assert got.kept == pytest.approx(want.kept_bytes, rel=0.01)
        assert got.forward == pytest.approx(sum(want.forward.values()), rel=0.15)
        assert got.backward == pytest.approx(sum(want.backward.values()), rel=0.15)


def test_head_chunks_have_no_formula_yet():
    layout, shape = zigzag(64, 1), Setting().shape
    assert isinstance(shape, Shape)
    plan = Plan(Group.alone(), layout, Mask(), strategy="ulysses", head_chunks=2)
    assert memory(plan, 0, shape).peak_bytes > 0  # one rank has no trades, and so no chunks


def test_the_script_compares_and_writes(tmp_path):
    path = tmp_path / "memory.json"
    options = [
        "--lengths",
        "512",
        "--ranks",
        "2",
        "--strategies",
        "ring",
        "--exact",
        "--json",
        path,
    ]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["rows"]
    assert row["ratio"] == pytest.approx(1.0, abs=0.05)


def test_a_wrong_ratio_is_a_failure():
    row = {"strategy": "ring", "ranks": 2, "length": 8, "rank": 1}
    assert failures([row | {"ratio": 1.04}, row | {"ratio": 0.96}]) == []
    assert len(failures([row | {"ratio": 1.06}, row | {"ratio": 0.94}])) == 2
