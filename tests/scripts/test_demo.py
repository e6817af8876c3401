"""The page of the demo, and what the demo takes for a failure; CI runs the demo itself."""

import copy

import demo
import pytest
from demo_page.figures import INK
from demo_page.page import write_page

from seqpar.testing import NAMES


def a_run(strategy, ranks):
    errors = {"errors": dict.fromkeys(NAMES, 1e-7), "allowed": dict.fromkeys(NAMES, 1e-6)}
    return {
        "strategy": strategy, "layout": "zigzag", "ranks": ranks, "seconds": 0.1, "peak_bytes": 9e6,
        "step": {"peak_bytes": 40e6 / ranks, "loss": 5.0, "gradient_norm": 7.0},
        "sent_bytes": [8, 8], "derived_bytes": [8, 8], "losses": [5.5, 5.0], "loss_difference": 1e-7,
        "equality": {dtype: copy.deepcopy(errors) for dtype in ("float64", "float32", "bfloat16")},
    }  # fmt: skip


@pytest.fixture
def report():
    step = {"peak_bytes": 40e6, "loss": 5.0, "gradient_norm": 7.0}
    return {
        "length": 8192, "text": "a <novel>", "machine": {"cores": 2}, "seconds": 3.0, "problems": [],
        "one_device": {"peak_bytes": 9e6, "seconds": 0.2, "step": step},
        "runs": [a_run(strategy, ranks) for ranks in (1, 2) for strategy in ("ring", "ulysses")],
    }  # fmt: skip


def page_of(report, folder):
    write_page(report, folder / "index.html")
    return (folder / "index.html").read_text("utf-8")


def test_the_page_needs_no_other_file_and_can_be_read_in_the_dark_and_on_a_phone(report, tmp_path):
    page = page_of(report, tmp_path)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert INK not in page
    assert "currentColor" in page
    assert "<img" not in page
    assert "<link" not in page


def test_the_page_says_what_was_found(report, tmp_path):
    page = page_of(report, tmp_path)
    assert "Everything agrees" in page
    assert "40 → 20 MB" in page
    assert "a &lt;novel&gt;" in page
    report["problems"] = ["ring at P=2: off"]
    page = page_of(report, tmp_path)
    assert "Everything agrees" not in page
    assert "ring at P=2: off" in page


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda run: run["step"].update(loss=5.001), "loss of the long step"),
        (lambda run: run["step"].update(gradient_norm=7.001), "gradient_norm"),
        (lambda run: run.update(sent_bytes=[8, 9]), "dry run"),
        (lambda run: run["equality"]["float32"]["errors"].update(dk=1e-5), "dk in float32"),
        (lambda run: run.update(loss_difference=1e-4), "losses differ"),
    ],
)
def test_what_does_not_agree_is_named(report, change, word):
    assert demo.problems(report["runs"], report["one_device"]) == []
    change(report["runs"][3])
    (found,) = demo.problems(report["runs"], report["one_device"])
    assert "ulysses at P=2" in found
    assert word in found
