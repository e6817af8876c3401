"""The plot of what was measured, a row of axes for each run; of rounds the fastest, and pale the median."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#777777", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe-Ito, by policy
TITLES = {
    "generation": "100 generated tokens",
    "LoRA step": "a LoRA step",
    "full step": "a full step",
}


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Milliseconds of each job, the fastest round in full colour up to the median, and forward passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    figure, grid = plt.subplots(
        len(runs), 4, figsize=(14, 3.5 * len(runs) + 0.5), squeeze=False, layout="constrained",
        width_ratios=(1, 1, 1, 1.25),
    )  # fmt: skip
    policies = list(dict.fromkeys(r["policy"] for run in runs for r in run["rows"]))
    colours = dict(zip(policies, COLOURS, strict=False))
    for line, run in zip(grid, runs, strict=True):
        for axes, (job, title) in zip(line[:3], TITLES.items(), strict=True):
            _bars(axes, run["rows"], job, colours)
            axes.set_title(title, fontsize=11)
        _sweep(line[3], run["rows"], colours)
        line[0].set_ylabel(f"{run['link']}\nms, fastest (pale: median)", fontsize=11)
    handles = [Patch(color=colour, label=policy) for policy, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[dict[str, Any]], job: str, colours: dict[str, str]) -> None:
    for n, r in enumerate(rows):
        least, median = r["least_ms"][job], r["ms"][job]
        axes.bar(n, median, width=0.75, color=colours[r["policy"]], alpha=0.3)
        axes.bar(n, least, width=0.75, color=colours[r["policy"]])
        axes.text(n, median, f"{least:,.0f}", ha="center", va="bottom", fontsize=8.5)
    axes.set_xticks(range(len(rows)), [f"P={r['ranks']}" for r in rows], fontsize=9)
    axes.set_ylim(0, max(r["ms"][job] for r in rows) * 1.12)
    axes.spines[["top", "right"]].set_visible(False)


def _sweep(axes: Any, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> None:
    dashes = {1: ":", 2: "-", 4: "--"}
    for r in rows:
        points = {
            int(k.split()[1]): ms for k, ms in r["least_ms"].items() if k.startswith("forward ")
        }
        axes.plot(list(points), list(points.values()), dashes[r["ranks"]], marker="o", ms=4.5,
                  color=colours[r["policy"]])  # fmt: skip
    for size in dict.fromkeys(r["ranks"] for r in rows):
        axes.plot([], [], dashes[size], color="black", label=f"P={size}")
    axes.set(xscale="log", yscale="log", xlabel="tokens")
    axes.set_title("a forward pass", fontsize=11)
    axes.set_xticks(list(points), [f"{n:,}" for n in points])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
