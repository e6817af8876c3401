"""What a study found, drawn: memory against N, and the longest N against P."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memory_study.polynomial import Fit
from memory_study.subjects import MIB, NOT_STORED, STORED, STRATEGIES


def plot(result: dict[str, Any], path: Path | str) -> None:
    """Draws memory against N with the fits, and the longest N against P, into an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    colours = {"ring": "#0072B2", "ulysses": "#D55E00", NOT_STORED: "#000000", STORED: "#777777"}
    sizes = {"ring": 9, "ulysses": 5}  # of markers, so that one shows behind the other
    all_ranks = sorted({row["ranks"] for row in result["series"]})
    memory = f"{result['memory_mib']:g} MiB"
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 6.8), layout="constrained")
    for row in result["series"]:
        fitted, name, at = Fit(**row["fit"]), row["subject"], all_ranks.index(row["ranks"])
        lengths, peaks = zip(*row["points"], strict=True)
        marker, label, pale, size = "x", name, 0.0, 7
        if name in STRATEGIES:  # paler for fewer ranks, and another marker
            marker, label = "osD^vP*X"[at % 8], f"{name}, P = {row['ranks']}"
            size = sizes[name]
            pale = 0.6 * (1 - at / max(1, len(all_ranks) - 1))
        colour = [c + pale * (1 - c) for c in to_rgb(colours[name])]
        left.plot(lengths, [x / MIB for x in peaks], marker, color=colour, ms=size, zorder=3)
        end = max(lengths[-1], row["longest"])
        for first, last, style in ((lengths[0], lengths[-1], "-"), (lengths[-1], end, ":")):
            grid = [first * (last / first) ** (n / 50) for n in range(51)]
            left.plot(grid, [fitted.at(n) / MIB for n in grid], style, color=colour, lw=size / 5)
        left.plot([], [], marker=marker, color=colour, ms=size, lw=size / 5, label=label)
        if name not in STRATEGIES:
            right.axhline(row["longest"], color=colour, ls="--")
            right.annotate(
                f"{name}: {row['longest']:,}", (0.98, row["longest"]), (0, -5),
                xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="top", color=colour, bbox={"fc": "white", "ec": "none", "pad": 1},
            )  # fmt: skip
    left.axhline(result["memory_mib"], color="#009E73", ls="--", label=memory)
    for name, marker in zip(STRATEGIES, "os", strict=True):
        rows = [row for row in result["series"] if row["subject"] == name]
        places = [(row["ranks"], row["longest"]) for row in rows]
        right.plot(*zip(*places, strict=True), color=colours[name], lw=sizes[name] / 5)
        for row, place in zip(rows, places, strict=True):
            face = "white" if row["is_extrapolated"] else colours[name]
            right.plot(*place, marker, color=colours[name], mfc=face, ms=sizes[name], zorder=3)
        right.plot([], [], marker=marker, color=colours[name], ms=sizes[name], label=name)
    right.plot([], [], "o", color="#777777", mfc="white", label="extrapolated by the fit")
    left.set(title="Memory of a rank: measured, fitted, extrapolated (dotted)")
    left.set(xlabel="sequence length N", ylabel="peak memory per rank, MiB")
    right.set(title=f"Longest sequence in {memory} per rank", xlabel="ranks P", ylabel="longest N")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(base=2, numticks=20))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False)
    right.set_xticks(all_ranks)
    right.margins(x=0.12, y=0.12)
    figure.savefig(path, dpi=150)
    plt.close(figure)
