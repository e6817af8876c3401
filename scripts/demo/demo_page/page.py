"""The words and the table of the demo's page, around its figures; a page that needs no other file."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from demo_page import figures
from demo_page.figures import Report
from seqpar.testing import NAMES

SECTIONS = {
    "Memory: P ranks share what one device would hold": (
        figures.memory,
        """A training step of a small transformer: forward, loss, backward, gradients summed. Counted is how
        far the resident memory of the busiest rank grows at its peak. Imports, weights and a first short
        step come before, and do not count. One device runs the same model with torch's own attention, and
        its loss and gradient norm are the same. Attention alone is in the table at the end. It also
        holds the blocks under way and float32 sums, so with few ranks it may need more than one device.""",
    ),
    "Same losses for every P and both modules": (
        figures.losses,
        """The same transformer, trained from the same weights on the same text. All curves lie on one
        another. Their distance from one rank is float32 rounding; 1e-5 is tolerated. Equal losses are drawn
        at 1e-9.""",
    ),
    "As exact as one device": (
        figures.errors,
        """The largest error over all ranks of the output and of each gradient, against dense attention in
        float64. Grey is what is allowed. In float64 that is the order of summation. Below it is twice the
        error of dense attention in the same precision, and one rounding step.""",
    ),
    "What it costs": (
        figures.costs,
        """Bytes are counted message by message, and drawn over what a dry run of the plan says. Each rank has
        one thread of this machine. With more ranks than cores, times cannot fall.""",
    ),
    "Who computes what": (
        lambda _: figures.ownership(),
        """The score matrix of a causal sequence on four ranks, coloured by the rank that holds the row. One
        loop serves all three layouts; only the balance differs.""",
    ),
}
NEXT = """
<pre>bash scripts/demo.sh --text my_novel.txt                 # this page for your own text
source .venv/bin/activate                                # which the demo has made
torchrun --nproc-per-node 2 scripts/train/byte_level.py  # the training loop to copy
python scripts/measure/longest_context.py                # the longest sequence in a memory limit
seqpar doctor                                            # what would compute attention on this machine</pre>
<p>README.md has a script for GPUs, and the five lines for Hugging Face models. docs/training.md says how
losses and gradients scale. Nothing on this page was run on a GPU.</p>
"""


def write_page(report: Report, path: Path) -> None:
    """Writes the page of a report."""
    sections = ""
    with plt.rc_context(figures.STYLE):
        for title, (draw, words) in SECTIONS.items():
            drawn = [f"<div>{figures.svg(figure, title)}</div>" for figure in draw(report)]
            beside, below = (f"<p>{words}</p>", "") if len(drawn) == 1 else ("", f"<p>{words}</p>")
            shown = f'<div class="figures">{"".join(drawn)}{beside}</div>{below}'
            sections += f"<section><h2>{title}</h2>{shown}</section>\n"
    path.write_text(_page(report, sections), "utf-8")


def cards(report: Report) -> list[tuple[str, str]]:
    """The results in brief: (a number, what it says)."""
    runs, one = report["runs"], report["one_device"]["step"]["peak_bytes"] / 1e6
    most = max(run["ranks"] for run in runs)
    split = max(run["step"]["peak_bytes"] for run in runs if run["ranks"] == most) / 1e6
    error = max(max(run["equality"]["float64"]["errors"].values()) for run in runs)
    loss = max(run["loss_difference"] for run in runs)
    off = sum(abs(s - f) for run in runs for s, f in _pairs(run))
    return [
        (f"{one:.0f} → {split:.0f} MB", f"peak of a training step: one device, and a rank of P = {most}"),
        (f"{error:.0e}", "largest float64 difference from dense attention, output and gradients"),
        (f"{loss:.0e}", f"largest relative difference of {len(runs[0]['losses'])} losses from P = 1"),
        (f"{off} bytes", "difference between what was sent and the dry run"),
    ]  # fmt: skip


def _pairs(run: dict[str, Any]) -> zip[tuple[int, int]]:
    return zip(run["sent_bytes"], run["derived_bytes"], strict=True)


def table(report: Report) -> str:
    """All numbers, a row for each strategy and P, one device first."""
    names = ["", "layout", "P", "step, peak MB", "attention alone, peak MB", "ms", "sent MB", "dry-run MB",
             *(f"{n}, float32" for n in NAMES), "loss difference"]  # fmt: skip
    one = report["one_device"]
    rows = [["one device", "", "", *_measured(one), *[""] * (len(names) - 6)]]
    for run in report["runs"]:
        found = run["equality"]["float32"]["errors"]
        rows.append([
            run["strategy"], run["layout"], str(run["ranks"]), *_measured(run),
            f"{sum(run['sent_bytes']) / 1e6:.3f}", f"{sum(run['derived_bytes']) / 1e6:.3f}",
            *(f"{found[n]:.1e}" for n in NAMES), f"{run['loss_difference']:.1e}",
        ])  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _measured(record: dict[str, Any]) -> list[str]:
    peaks = record["step"]["peak_bytes"], record["peak_bytes"]
    return [*(f"{peak / 1e6:.1f}" for peak in peaks), f"{1e3 * record['seconds']:.0f}"]


def _page(report: Report, sections: str) -> str:
    found = report["problems"]
    verdict = "<br>".join(map(html.escape, found)) or "Everything agrees with one device."
    ranks = ", ".join(str(p) for p in sorted({run["ranks"] for run in report["runs"]}))
    brief = "".join(
        f'<div class="card"><b>{n}</b><span>{words}</span></div>' for n, words in cards(report)
    )
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>seqpar: one attention, any number of ranks</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{Path(__file__).with_name("style.css").read_text("utf-8")}</style></head><body>
<h1>seqpar: one attention, any number of ranks</h1>
<p>Ring and Ulysses spread a sequence over P processes, called ranks, and give what one device gives. Here
they attended causally over {report["length"]:,} bytes of {html.escape(report["text"])}, forward and
backward, and trained a small language model on it, for P = {ranks}. A rank is a process on this machine's
CPU with one thread.</p>
<p class="verdict{"" if found else " good"}"><b>{verdict}</b></p>
<div class="cards">{brief}</div>
{sections}
<section><h2>All numbers</h2>{table(report)}</section>
<section><h2>What to do next</h2>{NEXT}</section>
<p><small>{html.escape(machine)}; {report["seconds"]:.0f} s. The same numbers: report.json.</small></p>
</body></html>
"""
