"""The page that the demo writes: plots and a table from its report."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from seqpar import Mask
from seqpar.layout import LAYOUTS, work
from seqpar.testing import NAMES
from seqpar.testing.oracle import visible

COLOURS = {"ring": "#0072B2", "ulysses": "#D55E00", "one device": "#555555"}  # Okabe-Ito
MARKERS = {"ring": "o", "ulysses": "s"}
RANK_COLOURS = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7"]
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "svg.fonttype": "path",
}  # fmt: skip
CAPTIONS = {
    "Same losses for every P and strategy": """A byte-level transformer, trained from the same weights
    on the same text. Left: all curves, drawn on one another. Right: how far each is from one rank;
    it is float32 rounding, and 1e-5 is tolerated.""",
    "As exact as one device": """The largest error of the output and of each gradient over all ranks,
    against dense attention in float64. Grey is what is allowed: in float64 the order of summation,
    below it twice the error of dense attention in the same precision and one rounding step.""",
    "What it costs": """Bytes are counted message by message and drawn over the formula. Memory is
    the growth of the resident set of the busiest rank, its own q, k, v and gradients included. Each
    rank has one thread; with more ranks than cores, times cannot fall.""",
    "Who computes what": """The score matrix of a causal sequence on four ranks, coloured by the rank
    that holds the row. One loop serves all three layouts; only the balance differs.""",
}


def write_page(report: dict[str, Any], path: Path) -> None:
    """Writes a page that needs no other file."""
    with plt.rc_context(STYLE):
        pictures = {
            "Same losses for every P and strategy": losses(report),
            "As exact as one device": errors(report),
            "What it costs": costs(report),
            "Who computes what": ownership(),
        }
    sections = "".join(
        f"<section><h2>{title}</h2>{_image(figure, title)}<p>{CAPTIONS[title]}</p></section>"
        for title, figure in pictures.items()
    )
    path.write_text(_page(report, sections))


def losses(report: dict[str, Any]) -> Figure:
    """Loss curves on one another, and their distance from one rank."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    reference = np.array(report["runs"][0]["losses"])
    for run in report["runs"]:
        curve = np.array(run["losses"])
        steps = np.arange(1, len(curve) + 1)
        width = 7 - 1.4 * run["ranks"]
        label = f"{run['strategy']}, P={run['ranks']}"
        left.plot(
            steps, curve, color=COLOURS[run["strategy"]], lw=max(width, 1), alpha=0.45, label=label
        )
        distance = np.maximum(np.abs(curve - reference) / reference, 1e-9)
        shade = 0.35 + 0.65 * run["ranks"] / 4
        right.plot(
            steps, distance, ls="", color=COLOURS[run["strategy"]], label=label,
            marker=MARKERS[run["strategy"]], ms=5, alpha=min(shade, 1), mfc="none",
        )  # fmt: skip
    left.set(xlabel="step", ylabel="loss (nats per byte)", title="loss")
    left.legend(fontsize=8, ncols=2, frameon=False)
    right.axhline(1e-5, color="black", ls="--", lw=1)
    right.annotate("tolerated", (1, 1e-5), xytext=(2, 3), textcoords="offset points", fontsize=8)
    right.set(
        xlabel="step", yscale="log", ylim=(5e-10, 5e-5), title="relative difference from one rank"
    )
    return figure


def errors(report: dict[str, Any]) -> Figure:
    """Errors of out, dq, dk, dv as markers over bars of what is allowed."""
    dtypes = list(report["runs"][0]["equality"])
    figure, axes = plt.subplots(1, len(dtypes), figsize=(11, 3.6), layout="constrained")
    for axis, dtype in zip(axes, dtypes, strict=True):
        x = np.arange(len(NAMES))
        allowed = [report["runs"][0]["equality"][dtype]["allowed"][n] for n in NAMES]
        floor = min(allowed) * 1e-5
        axis.bar(x, allowed, width=0.8, color="#dddddd", label="allowed")
        for n, run in enumerate(report["runs"]):
            found = [max(run["equality"][dtype]["errors"][name], floor * 2) for name in NAMES]
            shift = (n - (len(report["runs"]) - 1) / 2) * 0.085
            axis.plot(x + shift, found, ls="", marker=MARKERS[run["strategy"]], ms=4,
                      color=COLOURS[run["strategy"]], label=run["strategy"] if n < 2 else None)  # fmt: skip
        axis.set(xticks=x, xticklabels=NAMES, yscale="log", title=dtype)
        axis.set_ylim(min(min(r["equality"][dtype]["errors"].values()) for r in report["runs"]) / 5 or floor,
                      max(allowed) * 4)  # fmt: skip
    axes[0].set_ylabel("largest absolute error")
    axes[-1].legend(fontsize=8, frameon=False, loc="lower right")
    return figure


def costs(report: dict[str, Any]) -> Figure:
    """Bytes, memory and time against P."""
    figure, (sent, memory, seconds) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    ranks = sorted({run["ranks"] for run in report["runs"]})
    one = report["one_device"]
    for n, strategy in enumerate(("ring", "ulysses")):
        runs = [r for r in report["runs"] if r["strategy"] == strategy]
        look = {"color": COLOURS[strategy], "marker": MARKERS[strategy], "label": strategy}
        x = np.arange(len(ranks)) + (n - 0.5) * 0.36
        sent.bar(x, [max(r["formula_bytes"]) / 1e6 for r in runs], width=0.34, color=COLOURS[strategy],
                 alpha=0.35, label=f"{strategy}, formula")  # fmt: skip
        sent.plot(x, [max(r["sent_bytes"]) / 1e6 for r in runs], ls="", color=COLOURS[strategy],
                  marker=MARKERS[strategy], label=f"{strategy}, counted")  # fmt: skip
        memory.plot(ranks, [r["peak_bytes"] / 1e6 for r in runs], **look)
        seconds.plot(ranks, [1e3 * r["seconds"] for r in runs], **look)
    sent.set(xticks=np.arange(len(ranks)), xticklabels=ranks, title="MB sent by the busiest rank")
    sent.legend(fontsize=8, frameon=False, loc="upper left")
    sent.set_ylim(top=sent.get_ylim()[1] * 1.35)
    for axis, value in ((memory, one["peak_bytes"] / 1e6), (seconds, 1e3 * one["seconds"])):
        axis.axhline(value, color=COLOURS["one device"], ls="--", lw=1, label="one device, torch")
        axis.plot(
            ranks,
            [value / p for p in ranks],
            color=COLOURS["one device"],
            ls=":",
            lw=1,
            label="... / P",
        )
        axis.set_ylim(bottom=0)
        axis.set_xticks(ranks)
        axis.legend(fontsize=8, frameon=False)
    memory.set_title("peak memory growth per rank, MB")
    seconds.set_title("forward + backward, ms")
    for axis in (sent, memory, seconds):
        axis.set_xlabel("ranks P")
    return figure


def ownership(size: int = 4, length: int = 64) -> Figure:
    """The causal score matrix by owner of the row, for each layout, with its load."""
    figure, axes = plt.subplots(1, len(LAYOUTS), figsize=(11, 3.9), layout="constrained")
    seen = visible(length, True, None).numpy()
    axis: Axes
    for axis, (kind, make) in zip(axes, LAYOUTS.items(), strict=True):
        layout = make(length, size)
        owner = np.zeros(length, dtype=int)
        for rank in range(size):
            owner[layout.positions(rank).numpy()] = rank
        picture = np.where(seen, owner[:, None] + 1, 0)
        axis.imshow(
            picture,
            cmap=ListedColormap(["#f6f6f6", *RANK_COLOURS]),
            vmin=0,
            vmax=size,
            interpolation="nearest",
        )
        loads = work(make(8192, size), Mask(causal=True))
        axis.set_title(kind)
        axis.set_xlabel(
            f"busiest rank: {100 * max(loads) * size / sum(loads) - 100:.1f} % above the mean"
        )
        axis.grid(visible=False)
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel("query position")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in RANK_COLOURS]
    figure.legend(handles, [f"rank {r}" for r in range(size)], loc="outside lower center", ncols=size,
                  frameon=False, fontsize=9)  # fmt: skip
    return figure


def _image(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _page(report: dict[str, Any], sections: str) -> str:
    machine = ", ".join(f"{k} {v}" for k, v in report["machine"].items())
    verdict = "<br>".join(map(html.escape, report["problems"])) or "everything agrees"
    colour = "#dff3e4" if not report["problems"] else "#fbdede"
    head = "".join(
        f"<th>{name}</th>"
        for name in ("strategy", "layout", "P", *(f"{n}, float32" for n in NAMES), "sent MB", "formula MB",
                     "peak MB / rank", "ms", "loss difference")
    )  # fmt: skip
    rows = ""
    for run in report["runs"]:
        found = run["equality"]["float32"]["errors"]
        cells = [
            run["strategy"], run["layout"], run["ranks"], *(f"{found[n]:.1e}" for n in NAMES),
            f"{sum(run['sent_bytes']) / 1e6:.3f}", f"{sum(run['formula_bytes']) / 1e6:.3f}",
            f"{run['peak_bytes'] / 1e6:.1f}", f"{1e3 * run['seconds']:.0f}", f"{run['loss_difference']:.1e}",
        ]  # fmt: skip
        rows += "<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    ranks = ", ".join(str(p) for p in sorted({r["ranks"] for r in report["runs"]}))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>seqpar: the main job</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1120px;
  margin: 2em auto; padding: 0 1em; color: #222 }}
img {{ width: 100% }} h1 {{ margin-bottom: 0 }} h2 {{ margin: 1.6em 0 .3em }} p {{ max-width: 62em }}
table {{ border-collapse: collapse; font-size: 14px; width: 100% }}
td, th {{ padding: .3em .6em; text-align: right; border-bottom: 1px solid #ddd }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left }}
.verdict {{ background: {colour}; padding: .6em 1em; border-radius: 6px }} small {{ color: #666 }}
</style></head><body>
<h1>seqpar: one attention, any number of ranks</h1>
<p>Ring and Ulysses over {report["length"]} tokens of {html.escape(report["text"])}, causal,
forward and backward, for P = {ranks} processes.</p>
<p class="verdict"><b>{verdict}</b></p>
{sections}
<section><h2>All numbers</h2><table><tr>{head}</tr>{rows}</table></section>
<p><small>{html.escape(machine)}; {report["seconds"]:.0f} s. The same numbers: report.json.</small></p>
</body></html>
"""
