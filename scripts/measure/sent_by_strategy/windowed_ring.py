"""A causal mask with a window: bytes, CPU seconds and scores of a rank, and their plot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from seqpar import Group, Mask, Plan, attention, simulate
from seqpar.calls import Shape, dry_run, resolve
from seqpar.commands import progress
from seqpar.layout import LAYOUTS, visible_count

HEADS_WITH_WINDOW, D_WITH_WINDOW = (2, 1), 64
MASKS = {"full causal ring, zigzag": ("ring", "zigzag", False),
         "windowed ring, contiguous": ("ring", "contiguous", True),
         "windowed all-gather, contiguous": ("allgather", "contiguous", True)}  # fmt: skip


def windowed_point(name: str, ranks: int, length: int, window: int, rounds: int) -> dict[str, Any]:
    """Bytes, CPU seconds and visible scores of a rank in one step."""
    strategy, kind, has_window = MASKS[name]
    mask = Mask(causal=True, window=window if has_window else None)
    layout = LAYOUTS[kind](length, ranks)
    hq, hkv = HEADS_WITH_WINDOW

    def step(group: Group) -> tuple[float, int, int]:
        rows = layout.rows[group.rank]
        q, k, v, dout = (torch.randn(1, rows, h, D_WITH_WINDOW) for h in (hq, hkv, hkv, hq))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        plan = Plan(group, layout, mask, strategy=strategy)  # type: ignore[arg-type]
        start = time.thread_time()
        torch.autograd.grad(attention(*leaves, plan), leaves, dout)
        seconds = time.thread_time() - start
        said = dry_run.sent(resolve(plan, q, v), Shape.of(q, k, v), group.rank)
        return seconds, group.traffic.total.bytes, (said.forward + said.backward).bytes

    runs = [simulate(ranks, step) for _ in range(rounds)]
    seconds = [statistics.median(run[r][0] for run in runs) for r in range(ranks)]
    sent = [x[1] for x in runs[-1]]
    scores = [
        sum(visible_count(mask, a, b) for a in spans for other in layout.spans for b in other)
        for spans in layout.spans
    ]
    return {
        "name": name, "ranks": ranks, "length": length, "window": mask.window,
        "bytes": statistics.fmean(sent), "busiest_bytes": max(sent),
        "busiest_scores": max(scores), "seconds": statistics.median(seconds),
        "counted_is_derived": sent == [x[2] for x in runs[-1]],
    }  # fmt: skip


def windowed(rows: int, window: int, all_ranks: Sequence[int], rounds: int) -> dict[str, Any]:
    """Two series: so many rows on each of more and more ranks, and the same lengths on one number of them."""
    fixed = all_ranks[(len(all_ranks) - 1) // 2]
    places = [
        (series, ranks, length, name)
        for series, pairs in (
            ("rows of a rank fixed", [(p, rows * p) for p in all_ranks]),
            ("ranks fixed", [(fixed, rows * p) for p in all_ranks]),
        )
        for ranks, length in pairs
        for name in MASKS
    ]
    windowed_point(next(iter(MASKS)), 2, 64, window, 1)  # warms up
    points = []
    for series, ranks, length, name in progress.track(places, "windowed"):
        many = rounds if MASKS[name][2] else 1  # the full ring is long enough
        points.append({"series": series, **windowed_point(name, ranks, length, window, many)})
    return {"rows": rows, "window": window, "fixed_ranks": fixed, "rounds": rounds,
            "heads": HEADS_WITH_WINDOW, "d": D_WITH_WINDOW, "dtype": "float32", "points": points}  # fmt: skip


def plot(found: dict[str, Any], path: Path) -> None:
    """Draws the bytes of the busiest rank and the CPU time of the median one against N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    styles = dict(zip(MASKS, [("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^")], strict=True))
    figure, grid = plt.subplots(
        2, 2, figsize=(11, 8), sharex=True, sharey="row", layout="constrained"
    )
    titles = {
        "rows of a rank fixed": f"{found['rows']:,} rows on every rank: P = N / {found['rows']:,}",
        "ranks fixed": f"P = {found['fixed_ranks']} ranks: N / {found['fixed_ranks']} rows on each",
    }
    units = {"busiest_bytes": 1e6, "seconds": 1e-3}
    labels = {
        "busiest_bytes": "sent by the busiest rank in a step, MB",
        "seconds": "CPU time of the median rank in a step, ms",
    }
    for column, (series, title) in enumerate(titles.items()):
        for line, (what, unit) in enumerate(units.items()):
            axes = grid[line][column]
            for name, (colour, marker) in styles.items():
                points = [p for p in found["points"] if (p["series"], p["name"]) == (series, name)]
                x, y = ([p[key] for p in points] for key in ("length", what))
                axes.plot(
                    x, [v / unit for v in y], marker=marker, color=colour, ms=6, lw=1.6, label=name
                )
                if column == 0:
                    pairs = zip(points, x, y, strict=True)
                    for p, n, v in pairs if line == 0 and name.startswith("full") else ():
                        axes.annotate(f"P = {p['ranks']}", (n, v / unit), (0, 7), ha="center",
                                      textcoords="offset points", fontsize=8)  # fmt: skip
            axes.set(xscale="log", yscale="log")
            axes.margins(x=0.1, y=0.12)
            axes.grid(alpha=0.25)
            axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
            axes.xaxis.set_minor_locator(NullLocator())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
            if line == 0:
                axes.set_title(title)
            else:
                axes.set_xlabel("sequence length N, tokens")
            if column == 0:
                axes.set_ylabel(labels[what])
    heads = "{} query and {} kv head of {}".format(*found["heads"], found["d"])
    figure.suptitle(f"Window of {found['window']:,} keys, forward + backward; {heads}, float32")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
