"""The fuzzer finds nothing in what there is, and what is planted; it keeps that and tries it first."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fuzz
import pytest
import torch
from fuzz import Fuzz
from fuzzing import judge
from fuzzing.problem import USES, Poison, Problem, problems, strided
from hypothesis import HealthCheck, find, given, settings

from seqpar.testing import Case

PLAIN = Problem(Case(21, 4, 2), 3, "ring", None, "plain", "normal", "plain", None)

F16, F32, F64 = torch.float16, torch.float32, torch.float64
NAN = float("nan")
WRONG_ONCE = {
    "overflow of its own beside the poison": Problem(
        Case(10, 1, 1, d=3, vd=1, causal=False, dropout=0.9, dtype=F16, kind="contiguous"),
        1, "ring", None, "plain", "huge", "plain", Poison("q", 0.0, NAN),
    ),
    "products of a packed key that was copied": Problem(
        Case(1, 2, 2, d=8, vd=1, batch=2, causal=False, dtype=F64, kind="contiguous", kv_length=65),
        1, "materialised_rows", None, "plain", "normal", "plain", Poison("q", 0.0, NAN),
    ),
    "products of a slice of the width that was copied": Problem(
        Case(20, 2, 2, d=1, vd=1, causal=False, dtype=F64, kind="contiguous", documents=(0, 1, 20)),
        1, "materialised_depth", None, "plain", "normal", "plain", Poison("k", 0.0, NAN),
    ),
    "roundings that go the same way": Problem(
        Case(13, 2, 1, d=1, vd=1, causal=False, scale=0.0, dtype=F32, kind="contiguous"),
        1, "materialised_rows", None, "summed", "normal", "plain", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ONCE)
def test_what_was_found_is_right(name):
    judge.judge(WRONG_ONCE[name])


def test_some_problems_are_solved(tmp_path):
    tried = Fuzz(tmp_path)
    tried.round(60)
    assert tried.wrong == []
    assert tried.tried.total() >= 60


def test_the_script_says_what_it_tried(tmp_path):
    path = tmp_path / "fuzz.json"
    options = ["--cases", "12", "--examples", tmp_path / "examples", "--json", path]
    done = subprocess.run(
        [sys.executable, fuzz.__file__, *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ", 0 wrong" in done.stdout
    assert json.loads(path.read_text())["wrong"] == []


@pytest.mark.parametrize(
    "problem",
    [
        Problem(Case(21, 4, 2), 3, "ring", None, use, "normal", "plain", None)
        for use in USES
        if use != "shared"
    ]
    + [
        Problem(Case(21, 3, 3), 3, "ulysses", None, "shared", "normal", "width apart", None),
        Problem(
            Case(9, 2, 1, dtype=torch.float32), 2, "mesh", None, "plain", "steep", "sliced", None
        ),
    ],
    ids=lambda p: p.use,
)
def test_every_use_is_judged(problem, monkeypatch):
    """What is right passes, and a small error in out or in a gradient does not."""
    judge.judge(problem)
    real = judge.attention, judge.attention_with_lse
    monkeypatch.setattr(judge, "attention", lambda *a: real[0](*a) * 1.02)
    monkeypatch.setattr(judge, "attention_with_lse", lambda *a: (real[1](*a)[0] * 1.02, None))
    with pytest.raises(judge.WrongResultError, match="off by"):
        judge.judge(problem)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_poison_is_judged(name, monkeypatch):
    case = Case(21, 4, 2, documents=(0, 8, 21), dtype=torch.float32)
    poison = Poison(name, 0.2, float("nan"))
    problem = Problem(case, 2, "ring", None, "plain", "normal", "plain", poison)
    judge.judge(problem)
    real = judge.attention

    class Leaks(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x + x.sum() * 0

        @staticmethod
        def backward(_, grad):
            return grad + grad.sum() * 0

    leaks = Leaks.apply
    monkeypatch.setattr(
        judge, "attention", lambda q, k, v, plan: leaks(real(leaks(q), leaks(k), leaks(v), plan))
    )
    with pytest.raises(judge.WrongResultError, match="where it is not seen"):
        judge.judge(problem)


def test_poison_that_is_lost_is_found(monkeypatch):
    real = judge.attention
    monkeypatch.setattr(judge, "attention", lambda *a: real(*a).nan_to_num())
    poison = Poison("v", 0.5, float("nan"))
    problem = Problem(Case(9), 2, "ring", None, "plain", "normal", "plain", poison)
    with pytest.raises(judge.WrongResultError, match="is lost in out"):
        judge.judge(problem)


def test_what_fails_is_shrunk_kept_and_tried_first(tmp_path, monkeypatch):
    real = judge.solved

    def wrong(group, problem, tensors):
        results = real(group, problem, tensors)
        if problem.size > 2:
            results["out"] = results["out"] + 1e-3
        return results

    monkeypatch.setattr(judge, "solved", wrong)
    first = Fuzz(tmp_path)
    first.round(200)
    assert len(first.wrong) == 1
    assert "size=3," in first.wrong[0]
    assert "hq=1," in first.wrong[0]
    again = Fuzz(tmp_path)
    again.again()
    assert len(again.wrong) == 1
    before = again.tried.total()
    again.round(40)  # and goes on with others
    assert again.tried.total() > before + 5
    monkeypatch.setattr(judge, "solved", real)
    mended = Fuzz(tmp_path)
    mended.again()
    assert mended.wrong == []


def test_all_that_can_be_drawn_is():
    drawn = Counter()

    @settings(
        max_examples=600, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(problem=problems())
    def draw(problem):
        drawn.update([problem.use, problem.values, problem.strides, problem.strategy])
        drawn["poison"] += problem.poisoned is not None
        drawn[problem.implementation or "default"] += 1

    draw()
    names = [*USES, "normal", "steep", "huge", "tiny", "constant", "zero", "plain", "heads first"]
    names += ["sliced", "width apart", "shared batch", "poison", "default", "reference", "aten"]
    assert all(drawn[name] for name in names), drawn


@pytest.mark.parametrize("how", ["plain", "heads first", "sliced", "width apart", "shared batch"])
def test_strides_hold_the_same_numbers(how):
    x = torch.randn(1, 5, 3, 4)
    assert torch.equal(strided(x, how), x)
    assert (strided(x, how).stride() == x.stride()) == (how in ("plain", "shared batch"))


def test_a_problem_can_be_pasted():
    names = {"Problem": Problem, "Case": Case, "Poison": Poison, "torch": torch}
    assert eval(repr(PLAIN), names) == PLAIN
    assert find(problems(), lambda p: p.size == 2).size == 2
    assert Path(fuzz.__file__).name == "fuzz.py"
