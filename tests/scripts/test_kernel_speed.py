"""The kernel benchmark as far as a machine without a GPU can run it: numbers, ring, failures, tables."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import kernel_speed
import pytest
import torch
from kernel_race.contenders import Ranks, contenders, exact, meetings
from kernel_race.race import Timing, brief, median_max, median_sum, race, relative
from kernel_race.setting import Setting
from kernel_race.sheet import Sheet
from kernel_race.tune import CANDIDATES

from seqpar.layout import LAYOUTS
from seqpar.testing import oracle
from seqpar_kernels.tuning import KERNELS

SCRIPT = Path(kernel_speed.__file__)
CPU = torch.device("cpu")
SMALL = Setting(49, 4, 2, 8, causal=True, dtype=torch.float64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_refuses_without_a_gpu():
    done = subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kernel_speed.py needs a CUDA GPU and a torch that is built")
    assert done.stderr.count("\n") == 1


def test_flops_are_counted_the_usual_way():
    full = Setting(1000, 3, 1, 16, causal=False)
    assert full.forward_flops == 4 * 3 * 1000 * 1000 * 16
    assert Setting(1000, 3, 1, 16, causal=True).forward_flops == full.forward_flops / 2
    assert full.backward_flops == 2.5 * full.forward_flops
    packed = Setting(1000, 3, 1, 16, causal=True, documents=4)
    assert packed.forward_flops == full.forward_flops / 8
    for causal in (True, False):
        banded = Setting(1000, 3, 1, 16, causal, window=100)
        seen = int(oracle.visible(1000, causal, 100).sum())
        assert banded.forward_flops == pytest.approx(4 * 3 * seen * 16, rel=0.01)
    timing = Timing(forward=[[0.5, 0.5], [2.0, 1.0], [1.0, 1.0]], backward=[[1.0]] * 3)
    record = kernel_speed.rate(full, "x", timing, {})
    assert record["forward_seconds"] == 2.0
    assert record["forward_tflops"] == full.forward_flops / 2.0 / 1e12
    assert record["backward_tflops"] == full.backward_flops / 1e12


@pytest.mark.parametrize("causal", [True, False])
def test_the_oracle_in_chunks_is_the_oracle(causal):
    setting = Setting(49, 4, 2, 8, causal, dtype=torch.float64)
    tensors = setting.tensors(CPU)
    seen = oracle.visible(49, causal, None)
    scale = 8**-0.5
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    k, v = (x.repeat_interleave(2, dim=2) for x in leaves[1:])
    s = torch.einsum("bihd,bjhd->bhij", leaves[0], k) * scale
    p = torch.softmax(s.masked_fill(~seen, -torch.inf), -1)
    out = torch.einsum("bhij,bjhd->bihd", p, v)
    expected = out, *torch.autograd.grad(out, leaves, tensors[3])
    found, lse = exact(tensors, setting.mask, chunk=16)
    torch.testing.assert_close(lse.exp(), torch.exp(s).masked_fill(~seen, 0).sum(-1).mT)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("implementation", ["aten", "reference"])
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_in_turn_compute_the_whole(ranks, kind, implementation):
    tensors = SMALL.tensors(CPU)
    ring = Ranks(tensors, LAYOUTS[kind](49, ranks), SMALL.mask, implementation)
    assert len(ring.forward) == ranks
    for _ in range(2):  # rounds do not add up
        for step in (*ring.forward, *ring.backward):
            step()
    for got, want in zip(ring.results(), exact(tensors, SMALL.mask)[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "blocks"), [("contiguous", [1, 2, 3, 4]), ("zigzag", [4, 4, 4, 4])]
)
def test_blocks_hold_every_visible_score_once(kind, blocks):
    """A zigzag rank meets the rows of each owner in one block: their runs are joined."""
    layout = LAYOUTS[kind](64, 4)
    met = [
        [b for _, blocks in meetings(layout, SMALL.mask, 8, r) for b in blocks] for r in range(4)
    ]
    assert [len(x) for x in met] == blocks
    sizes = [
        (rows.stop - rows.start, cols.stop - cols.start, b) for m in met for rows, cols, b in m
    ]
    assert sum(b.band.count(i, j) for i, j, b in sizes) == 64 * 65 // 2
    assert [owner for owner, _ in meetings(layout, SMALL.mask, 8, 1)] == [1, 0, 3, 2]


def test_who_fails_is_recorded_and_the_others_go_on():
    class Fails:
        def __init__(self, at):
            self.count, self.at = 0, at
            self.forward, self.backward = [self.step], [lambda: None]

        def step(self):
            self.count += 1
            if self.count == self.at:
                raise RuntimeError("out of registers")

    def refuse():
        raise NotImplementedError("no such kernel")

    makers = {"refuses": refuse, "early": partial(Fails, 1), "late": partial(Fails, 4)}
    timings = race(makers | {"well": partial(Fails, 0)}, 3, CPU)
    assert timings["refuses"].error == "NotImplementedError: no such kernel"
    assert timings["early"].error == timings["late"].error == "RuntimeError: out of registers"
    assert timings["late"].forward == []
    assert timings["well"].error is None
    assert len(timings["well"].forward) == len(timings["well"].backward) == 3


def test_contenders_meet_on_a_cpu_too():
    """CuDNN cannot, and its record says so; torch's flash attention can."""
    setting = Setting(96, 4, 4, 16, causal=True, dtype=torch.bfloat16)
    names = ["seqpar", "seqpar aten", "torch flash", "torch cuDNN"]
    assert set(contenders(setting, setting.tensors(CPU))) == {*names, "torch flex"}
    everyone = kernel_speed.contenders
    with pytest.MonkeyPatch.context() as patch:  # FlexAttention takes long to compile
        patch.setattr(
            kernel_speed, "contenders",
            lambda *asked: {n: make for n, make in everyone(*asked).items() if n in names},
        )  # fmt: skip
        records = kernel_speed.rates(setting, 2, CPU, small=64)
    by_name = {r["contender"]: r for r in records}
    assert list(by_name) == names
    for name in names[:3]:
        assert by_name[name]["error"] is None
        assert by_name[name]["forward_tflops"] > 0
        assert len(by_name[name]["backward_rounds"]) == 2
        assert all(1e-4 < error < 1e-2 for error in by_name[name]["errors"].values())
    assert by_name["torch cuDNN"]["error"]
    assert by_name["torch cuDNN"]["forward_tflops"] is None
    json.dumps(records)
    sheet = kernel_speed.rate_sheet(records)
    assert [len(row) for row in sheet.rows] == [len(sheet.columns)] * 4
    assert sheet.rows[3][-1]


@pytest.mark.parametrize("implementation", ["aten", "reference"])
def test_ring_tax_runs_on_a_cpu_too(implementation):
    records = kernel_speed.ring_tax(SMALL, 4, implementation, 2, CPU)
    assert [r["layout"] for r in records] == ["zigzag", "contiguous"]
    for r in records:
        assert r["error"] is None
        assert r["forward_tax"] == r["forward_ring_seconds"] / r["forward_one_block_seconds"]
        assert r["backward_slowest"] > r["backward_tax"] / 2
    sheet = kernel_speed.ring_sheet(records)
    assert [len(row) for row in sheet.rows] == [len(sheet.columns)] * 2


def test_ring_tax_of_what_cannot_run_says_why():
    records = kernel_speed.ring_tax(SMALL, 2, "triton", 2, CPU)
    assert all(r["error"].startswith("NotImplementedError") for r in records)
    sheet = kernel_speed.ring_sheet(records)
    assert [len(row) for row in sheet.rows] == [len(sheet.columns)] * 2


def test_tax_is_the_sum_over_the_whole():
    one = Timing(forward=[[2.0], [1.0], [4.0]], backward=[[5.0]] * 3)
    ring = Timing(forward=[[1.0, 1.5]] * 3, backward=[[2.0, 3.0, 1.0]] * 3)
    numbers = kernel_speed.tax(one, ring, 2)
    assert numbers["forward_tax"] == 2.5 / 2
    assert numbers["forward_slowest"] == 2 * 1.5 / 2
    assert numbers["backward_tax"] == 6 / 5
    assert median_sum([[1, 2], [9, 0], [0, 1]]) == 3
    assert median_max([[1, 2], [9, 0], [0, 1]]) == 2


def test_relative_error_lets_nothing_unfinished_pass():
    x = torch.tensor([3.0, 4.0])
    assert relative(x, x) == 0
    assert relative(x + torch.tensor([0.0, 0.5]), x) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="not finite"):
        relative(x * torch.nan, x)
    with pytest.raises(ValueError, match="shape"):
        relative(x[:1], x)


def test_tables_are_markdown_too():
    sheet = Sheet("T", ("name", "ms"), [("a|b", "1.0")])
    lines = ["**T**", "", "| name | ms |", "| --- | ---: |", "| a\\|b | 1.0 |"]
    assert list(sheet.markdown()) == lines
    assert sheet.rich().row_count == 1
    assert brief(None) == ""
    assert brief("x" * 100 + "\nmore", 10) == "xxxxxxx..."


def test_a_failing_stage_is_reported_and_the_rest_is_written(monkeypatch, capsys, tmp_path):
    def fail(_):
        raise MemoryError("no room")

    def some(setting):
        return [kernel_speed.rate(setting, "seqpar triton", Timing([[1.0]], [[2.0]]), "broke")]

    stages = [("rates", partial(fail, SMALL)), ("rates", partial(some, SMALL))]
    monkeypatch.setattr(kernel_speed, "stages", lambda *_: iter(stages))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = kernel_speed.circumstances(CPU)
    monkeypatch.setattr(kernel_speed, "circumstances", lambda _: facts)
    paths = tmp_path / "x.json", tmp_path / "x.md"
    command = ["kernel_speed.py", "--json", str(paths[0]), "--markdown", str(paths[1])]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="1"):
        kernel_speed.main()
    assert "MemoryError: no room" in capsys.readouterr().out
    found = json.loads(paths[0].read_text())
    assert found["torch"] == torch.__version__
    assert len(found["failures"]) == len(found["rates"]) == 1
    assert "| seqpar triton | 1000.000 |" in paths[1].read_text()


def test_every_stage_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(kernel_speed, "implementations", lambda *_: ["triton"])

    def kinds(**options):
        defaults = {"quick": False, "parts": ["rates", "ring"], "tune": None, "rounds": 10}
        defaults |= {"settings": None}
        args = kernel_speed.argparse.Namespace(**(defaults | options))
        return [kind for kind, _ in kernel_speed.stages(args, CPU)]

    assert kinds() == ["rates"] * len(kernel_speed.SETTINGS) + ["ring"] * 3
    assert kinds(settings=[3, 5], parts=["rates"]) == ["rates"] * 2
    assert kinds(quick=True) == ["rates"] * 2 + ["ring"] * 2
    assert kinds(parts=["ring"]) == ["ring"] * 3
    assert kinds(tune=[]) == ["tune"] * 9
    assert kinds(tune=["dq"]) == ["tune"] * 3


def test_tiles_are_ranked():
    """Interpreted: the ranks mean nothing, but every kernel runs and agrees with the table's tiles."""
    assert set(CANDIDATES) == set(KERNELS)
    code = """
import torch
from kernel_race.setting import Setting
from kernel_race.tune import tune, tune_sheet
from seqpar_kernels.tuning import Tiles
setting = Setting(33, 2, 1, 16, causal=True, dtype=torch.float32)
for kernel in ("forward", "dq", "dkdv"):
    tried = [Tiles(64, 32, 1, 1), Tiles(24, 16, 1, 1)]
    records = tune(kernel, setting, tried, 1, torch.device("cpu"))
    assert [r["error"] is None for r in records] == [True, True, False], records
    assert all(r["largest_error"] < 1e-5 for r in records[:2]), records
    assert sorted(r["is_in_table"] for r in records) == [False, False, True], records
    assert len(list(tune_sheet(records).markdown())) == 7
"""
    paths = f"{SCRIPT.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    environment.pop("SEQPAR_CHECK_SHAPES", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
