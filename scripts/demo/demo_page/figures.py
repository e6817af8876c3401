"""The figures of the demo's page: SVGs whose ink is the page's, so that they are read light or dark.

A figure is one panel, so that the page can stack them on a phone.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seqpar import Mask
from seqpar.layout import LAYOUTS, work
from seqpar.testing import NAMES
from seqpar.testing.oracle import visible

COLOURS = {"ring": "#2E86D1", "ulysses": "#D55E00"}  # legible on white and on black
MARKERS = {"ring": "o", "ulysses": "s"}
RANK_COLOURS = ["#56B4E9", "#E69F00", "#2BB594", "#CC79A7"]
INK = "#010203"  # stands for the colour of the page's text
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "svg.fonttype": "path",
    "legend.frameon": False, "legend.fontsize": 9, "figure.figsize": (4.4, 3.4),
    "figure.constrained_layout.use": True,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}  # fmt: skip
Report = dict[str, Any]


def memory(report: Report) -> list[Figure]:
    """What a rank holds in a training step, against P."""
    figure, axis = plt.subplots()
    one = report["one_device"]["step"]["peak_bytes"] / 1e6
    _against_ranks(axis, report, one, lambda run: run["step"]["peak_bytes"] / 1e6)
    axis.set_title(f"step over {report['length']:,} tokens, peak MB")
    return [figure]


def losses(report: Report) -> list[Figure]:
    """Loss curves on one another, and their distance from one rank."""
    (curves, left), (distances, right) = plt.subplots(), plt.subplots()
    reference = np.array(report["runs"][0]["losses"])
    for run in report["runs"]:
        colour, curve = COLOURS[run["strategy"]], np.array(run["losses"])
        steps = np.arange(1, len(curve) + 1)
        label = f"{run['strategy']}, P={run['ranks']}"
        left.plot(
            steps, curve, color=colour, lw=max(7 - 1.4 * run["ranks"], 1), alpha=0.45, label=label
        )
        distance = np.maximum(np.abs(curve - reference) / reference, 1e-9)
        shade = min(0.35 + 0.65 * run["ranks"] / 4, 1)
        right.plot(
            steps, distance, ls="", color=colour, marker=MARKERS[run["strategy"]], ms=5, alpha=shade,
            mfc="none",
        )  # fmt: skip
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="loss, all curves")
    left.legend(ncols=2)
    right.axhline(1e-5, color=INK, ls="--", lw=1)
    right.annotate("tolerated", (1, 1e-5), xytext=(2, 3), textcoords="offset points", fontsize=9)
    right.set(
        xlabel="step", yscale="log", ylim=(5e-10, 5e-5), title="relative difference from P = 1"
    )
    return [curves, distances]


def errors(report: Report) -> list[Figure]:
    """Errors of out, dq, dk, dv as markers over bars of what is allowed, for each dtype."""
    return [_errors(report, dtype) for dtype in report["runs"][0]["equality"]]


def costs(report: Report) -> list[Figure]:
    """Bytes and time of one attention, against P."""
    (bytes_figure, sent), (time_figure, seconds) = plt.subplots(), plt.subplots()
    ranks = _ranks(report)
    for n, strategy in enumerate(COLOURS):
        runs = [r for r in report["runs"] if r["strategy"] == strategy]
        x = np.arange(len(ranks)) + (n - 0.5) * 0.36
        derived, counted = (
            [max(r[name]) / 1e6 for r in runs] for name in ("derived_bytes", "sent_bytes")
        )
        sent.bar(
            x, derived, width=0.34, color=COLOURS[strategy], alpha=0.35, label=f"{strategy}, dry run"
        )  # fmt: skip
        sent.plot(
            x, counted, ls="", color=COLOURS[strategy], marker=MARKERS[strategy], label=f"{strategy}, counted"
        )  # fmt: skip
    sent.set(xticks=np.arange(len(ranks)), xticklabels=ranks, xlabel="ranks P")
    sent.set_title("MB sent by the busiest rank")
    sent.legend(loc="upper left")
    sent.set_ylim(top=sent.get_ylim()[1] * 1.5)
    _against_ranks(
        seconds, report, 1e3 * report["one_device"]["seconds"], lambda r: 1e3 * r["seconds"]
    )
    seconds.set_title("attention, forward + backward, ms")
    return [bytes_figure, time_figure]


def ownership(size: int = 4, length: int = 64) -> list[Figure]:
    """The causal score matrix by owner of the row, for each layout, with its load."""
    figures = []
    seen = visible(length, True, None).numpy()
    for kind, make in LAYOUTS.items():
        figure, axis = plt.subplots(figsize=(4.4, 4.4))
        layout = make(length, size)
        owner = np.zeros(length, dtype=int)
        for rank in range(size):
            owner[layout.positions(rank).numpy()] = rank
        axis.imshow(
            np.where(seen, owner[:, None] + 1, 0), cmap=ListedColormap(["#00000000", *RANK_COLOURS]),
            vmin=0, vmax=size, interpolation="nearest",
        )  # fmt: skip
        loads = work(make(8192, size), Mask(causal=True))
        above = 100 * max(loads) * size / sum(loads) - 100
        axis.set(title=kind, xlabel=f"busiest rank: {above:.1f} % above the mean", ylabel="query")
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in RANK_COLOURS]
        axis.legend(handles, [f"rank {r}" for r in range(size)], loc="upper right")
        figures.append(figure)
    return figures


def svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page, in the page's ink, on its ground."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    element = text[text.index("<svg") :].replace(INK, "currentColor")
    return element.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _ranks(report: Report) -> list[int]:
    return sorted({run["ranks"] for run in report["runs"]})


def _against_ranks(axis: Axes, report: Report, one: float, value: Any) -> None:
    """A line for each strategy against P, beside one device and an equal share of it."""
    ranks = _ranks(report)
    for strategy, colour in COLOURS.items():
        values = [value(run) for run in report["runs"] if run["strategy"] == strategy]
        axis.plot(ranks, values, color=colour, marker=MARKERS[strategy], label=strategy)
    axis.axhline(one, color=INK, alpha=0.6, ls="--", lw=1, label="one device, torch")
    shares = [one / p for p in ranks]
    axis.plot(ranks, shares, color=INK, alpha=0.6, ls=":", lw=1, label="one device / P")
    axis.set(xticks=ranks, xlabel="ranks P")
    axis.set_ylim(bottom=0)
    axis.legend()


def _errors(report: Report, dtype: str) -> Figure:
    figure, axis = plt.subplots()
    runs, x = report["runs"], np.arange(len(NAMES))
    allowed = [runs[0]["equality"][dtype]["allowed"][n] for n in NAMES]
    floor = min(allowed) * 1e-5
    axis.bar(x, allowed, width=0.8, color=INK, alpha=0.2, label="allowed")
    for n, run in enumerate(runs):
        found = [max(run["equality"][dtype]["errors"][name], floor * 2) for name in NAMES]
        shift = (n - (len(runs) - 1) / 2) * 0.085
        strategy = run["strategy"]
        axis.plot(
            x + shift, found, ls="", marker=MARKERS[strategy], ms=4, color=COLOURS[strategy],
            label=strategy if n < 2 else None,
        )  # fmt: skip
    least = min(min(run["equality"][dtype]["errors"].values()) for run in runs)
    axis.set(xticks=x, xticklabels=NAMES, yscale="log", title=f"{dtype}: largest error")
    axis.set_ylim(least / 5 or floor, max(allowed) * 100)
    axis.legend(loc="upper center", ncols=3)
    return figure
