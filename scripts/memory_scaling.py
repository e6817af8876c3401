"""Measures the peak memory of a rank against N and P, and the longest sequence that then fits.

Forward and backward of causal attention: every strategy on P ranks, and two ways of doing it on one
device, with the N x N scores stored and not. Each measurement is made in processes of its own, after
a tiny step that starts threads and connections, and counts the rank's own q, k, v, dout and their
gradients; the rank that needed most counts. A line (with stored scores a parabola) is fitted to the
measured lengths, and says how long a sequence fits `--memory-mib` per rank.

Memory is resident memory, with what glibc keeps in its heap of freed tensors: the same run varied by
5 % at all lengths, and needed 5 to 20 % less with MALLOC_MMAP_THRESHOLD_=65536 in the environment,
which gives freed tensors back. Linux only.

Example: python scripts/memory_scaling.py --lengths 1024 2048 4096 8192 --ranks 1 2 4 \\
             --memory-mib 256 --verify --plot memory.png --json memory.json
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from seqpar import Group, Mask, Plan, attention
from seqpar.layout import LAYOUTS
from seqpar.testing import PeakMemory, ProcessWorld

MIB = 2**20
STRATEGIES = {"ring": "zigzag", "ulysses": "contiguous"}  # strategy -> the layout it likes best
STORED, NOT_STORED = "one device, scores stored", "one device, scores not stored"
STORED_LIMIT_BYTES = 4 * 2**30  # lengths for which stored scores would need more are left out
WARM_UP_ROWS = 8  # of a rank
VERIFY_FACTOR = 4  # `--verify` goes no further than this times the longest measured length
VERIFY_TOLERANCE = 0.15


@dataclass(frozen=True)
class Setting:
    """The tensors of a step: few heads, because memory is studied and not speed."""

    heads: int = 4
    d: int = 32
    dtype: str = "float32"


@dataclass(frozen=True)
class Fit:
    """bytes = sum of coefficients[n] * N**n, none negative; `misfit` is the worst relative one."""

    coefficients: tuple[float, ...]
    misfit: float

    def __call__(self, length: float) -> float:
        return sum(c * length**n for n, c in enumerate(self.coefficients))


def attention_with_stored_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on `[b h s d]` the plain way: the softmax of all scores waits for backward."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ v


def stored_bytes(length: int, setting: Setting) -> int:
    """What stored scores need, roughly: three copies in the backward of softmax, the mask, q to dv."""
    item = torch.empty(0, dtype=getattr(torch, setting.dtype)).element_size()
    return (
        length**2 * (3 * setting.heads * item + 1) + 12 * length * setting.heads * setting.d * item
    )


def step(group: Group, subject: str, length: int, setting: Setting) -> None:
    """Forward and backward of a subject on this rank's rows of random tensors."""
    if subject in STRATEGIES:
        layout = LAYOUTS[STRATEGIES[subject]](length, group.size)
        plan = Plan(group, layout, Mask(causal=True), strategy=subject)  # type: ignore[arg-type]
        shape = 1, layout.rows[group.rank], setting.heads, setting.d
    else:
        shape = 1, setting.heads, length, setting.d
    dtype = getattr(torch, setting.dtype)
    q, k, v, dout = (torch.randn(shape, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if subject in STRATEGIES:
        out = attention(q, k, v, plan)
    elif subject == STORED:
        out = attention_with_stored_scores(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.autograd.grad(out, leaves, dout)


def step_bytes(group: Group, subject: str, length: int, setting: Setting) -> int:
    """Peak growth of this process in bytes over one step."""
    step(group, subject, WARM_UP_ROWS * group.size, setting)
    with PeakMemory() as peak:
        step(group, subject, length, setting)
    return peak.bytes


def measure(subject: str, length: int, ranks: int, setting: Setting) -> int:
    """Peak bytes of the rank that needs most, in fresh processes."""
    with ProcessWorld(ranks) as world:
        return max(world.run(step_bytes, subject, length, setting, timeout=600.0))


def fit(points: Sequence[tuple[int, int]], degree: int) -> Fit:
    """The polynomial in N nearest to (N, bytes), relatively, of all without negative coefficients.

    Relatively, because the measurements scatter by the same share at all lengths.

    Raises:
        ValueError: fewer than `degree` + 1 points.
    """
    if len(points) <= degree:
        raise ValueError(f"a fit of degree {degree} takes {degree + 1} lengths, got {len(points)}")
    lengths, peaks = torch.tensor(points, dtype=torch.float64).unbind(1)
    powers = lengths[:, None] ** torch.arange(degree + 1)
    system, ones = powers / peaks[:, None], torch.ones(len(points), 1, dtype=torch.float64)
    size = system.amax(0)  # columns of one size keep it well conditioned
    found: list[tuple[float, Fit]] = []
    for num_lower in range(degree + 1):
        for kept in ([*lower, degree] for lower in combinations(range(degree), num_lower)):
            solved = torch.linalg.lstsq(system[:, kept] / size[kept], ones).solution[:, 0]
            if bool((solved >= 0).all()):
                coefficients = torch.zeros(degree + 1, dtype=torch.float64)
                coefficients[kept] = solved / size[kept]
                off = system @ coefficients - 1
                found.append(
                    (float(off @ off), Fit(tuple(coefficients.tolist()), float(off.abs().max())))
                )
    return min(found, key=lambda pair: pair[0])[1]


def longest(fitted: Fit, memory_bytes: float) -> int:
    """The longest N whose fitted bytes fit the memory; 0 if none does."""
    return max(0, bisect.bisect_right(range(2**40), memory_bytes, key=fitted) - 1)


def study(
    lengths: Sequence[int],
    ranks: Sequence[int],
    memory_mib: float,
    setting: Setting,
    repeats: int = 1,
) -> dict[str, Any]:
    """Measures every subject at every length (median of `repeats`) and fits: the content of the JSON."""
    lengths, ranks = sorted(set(lengths)), sorted(set(ranks))
    subjects = [(name, p) for name in STRATEGIES for p in ranks] + [(NOT_STORED, 1), (STORED, 1)]
    small = [n for n in lengths if stored_bytes(n, setting) <= STORED_LIMIT_BYTES]
    notes = [
        f"{STORED}: not measured at N = {n:,}, would need {stored_bytes(n, setting) / 2**30:.1f} GiB"
        for n in lengths
        if n not in small
    ]
    if len(small) < 3:
        subjects.pop()
        notes.append(f"{STORED}: left out, a parabola takes three lengths")
    jobs = [(*s, n) for s in subjects for n in (small if s[0] == STORED else lengths)]
    points: dict[tuple[str, int], list[tuple[int, int]]] = {s: [] for s in subjects}
    # No refreshing thread: it would compete with the ranks for the cores.
    quiet = Progress(console=Console(stderr=True), auto_refresh=False)
    with quiet:
        for subject, p, length in quiet.track(jobs, description="measuring"):
            quiet.refresh()
            peaks = [measure(subject, length, p, setting) for _ in range(repeats)]
            points[subject, p].append((length, int(statistics.median(peaks))))
    series = []
    for (subject, p), measured in points.items():
        fitted = fit(measured, 2 if subject == STORED else 1)
        fits = longest(fitted, memory_mib * MIB)
        series.append(
            {
                "subject": subject, "ranks": p, "points": measured, **asdict(fitted),
                "longest": fits, "is_extrapolated": fits > measured[-1][0],
            }
        )  # fmt: skip
    return {
        "setting": asdict(setting), "memory_mib": memory_mib, "repeats": repeats, "notes": notes,
        "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"), "series": series,
    }  # fmt: skip


def fit_of(row: dict[str, Any]) -> Fit:
    """The fit of one of the series of a result."""
    return Fit(tuple(row["coefficients"]), row["misfit"])


def verify(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures the strategies with most ranks at the longest N, or at the most `--verify` goes to."""
    checks = []
    for row in result["series"]:
        if row["subject"] in STRATEGIES and row["ranks"] == max(
            r["ranks"] for r in result["series"]
        ):
            length = min(row["longest"], VERIFY_FACTOR * row["points"][-1][0])
            measured = measure(row["subject"], length, row["ranks"], Setting(**result["setting"]))
            check = {"predicted": fit_of(row)(length), "measured": measured}
            checks.append(
                {k: row[k] for k in ("subject", "ranks", "longest")} | {"length": length} | check
            )
    return checks


def failures(result: dict[str, Any]) -> list[str]:
    """What is not as it should be: memory that does not fall with P, predictions that were wrong."""
    found = []
    for name in STRATEGIES:
        rows = [row for row in result["series"] if row["subject"] == name]
        for few, many in pairwise(rows):
            (length, before), (_, after) = few["points"][-1], many["points"][-1]
            if after >= before:
                found.append(
                    f"{name} at N = {length:,} needs {before / MIB:.1f} MiB on each of "
                    f"{few['ranks']} ranks and {after / MIB:.1f} on each of {many['ranks']}"
                )
    for check in result.get("verified", []):
        if abs(check["measured"] / check["predicted"] - 1) > VERIFY_TOLERANCE:
            found.append(f"the fit of {check['subject']} is wrong at N = {check['length']:,}")
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the measurements, the fits, and what `verify` found."""
    setting, memory = result["setting"], f"{result['memory_mib']:g} MiB"
    lengths = sorted({n for row in result["series"] for n, _ in row["points"]})
    table = Table(
        title=f"peak MiB per rank, forward + backward, causal, {setting['dtype']}, "
        f"{setting['heads']} heads of {setting['d']}"
    )
    fits = Table(title=f"bytes = a + b N + c N², and the longest N that fits {memory} per rank")
    for heads in (("", "P", *(f"N={n}" for n in lengths)), ("", "P", "a MiB", "b", "c", "misfit")):
        for head in heads:
            (table if "a MiB" not in heads else fits).add_column(
                head, justify="right" if head else "left"
            )
    fits.add_column(f"longest N in {memory}", justify="right")
    fits.add_column("how known")
    for row in result["series"]:
        name, p, peaks = row["subject"], str(row["ranks"]), dict(row["points"])
        table.add_row(name, p, *(f"{peaks[n] / MIB:.1f}" if n in peaks else "-" for n in lengths))
        a, b, *c = row["coefficients"]
        how = "extrapolated by the fit" if row["is_extrapolated"] else "in the measured range"
        fits.add_row(
            name, p, f"{a / MIB:.2f}", f"{b:.0f}", f"{c[0]:.1f}" if c else "",
            f"{row['misfit']:.1%}", f"{row['longest']:,}", how,
        )  # fmt: skip
    console.print(table, fits)
    for note in result["notes"]:
        console.print(note)
    for check in result.get("verified", []):
        predicted, measured = check["predicted"], check["measured"]
        what = (
            "longest"
            if check["length"] == check["longest"]
            else "not the longest, too far to check"
        )
        console.print(
            f"{check['subject']}, P = {check['ranks']}, N = {check['length']:,} ({what}): predicted "
            f"{predicted / MIB:.1f} MiB, measured {measured / MIB:.1f} ({measured / predicted - 1:+.1%})"
        )


def plot(result: dict[str, Any], path: Path | str) -> None:
    """Draws memory against N with the fits, and the longest N against P, into an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgb
    from matplotlib.ticker import FuncFormatter, NullLocator

    colours = {"ring": "#0072B2", "ulysses": "#D55E00", NOT_STORED: "#000000", STORED: "#777777"}
    all_ranks = sorted({row["ranks"] for row in result["series"]})
    memory = result["memory_mib"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6.2), layout="constrained")
    ends = [n for row in result["series"] for n in (*dict(row["points"]), row["longest"]) if n > 0]
    for row in result["series"]:
        fitted, name = fit_of(row), row["subject"]
        lengths, peaks = zip(*row["points"], strict=True)
        # Paler for fewer ranks; markers differ too, so that colour is never all there is.
        at = all_ranks.index(row["ranks"])
        pale = 0.0 if name not in STRATEGIES else 0.55 * (1 - at / max(1, len(all_ranks) - 1))
        colour = [c + pale * (1 - c) for c in to_rgb(colours[name])]
        marker = "osD^vP*X"[at % 8] if name in STRATEGIES else "x"
        grid = [lengths[0] * (lengths[-1] / lengths[0]) ** (n / 50) for n in range(51)]
        label = f"{name}, P = {row['ranks']}" if name in STRATEGIES else name
        left.plot(lengths, [x / MIB for x in peaks], marker, color=colour, ls="", zorder=3)
        left.plot(grid, [fitted(n) / MIB for n in grid], color=colour, lw=1.6)
        left.plot([], [], color=colour, marker=marker, label=label)
        if row["is_extrapolated"]:
            beyond = [lengths[-1], row["longest"]]
            left.plot(beyond, [fitted(n) / MIB for n in beyond], color=colour, lw=1.2, ls=":")
    left.axhline(memory, color="#009E73", lw=1.2, ls="--", label=f"{memory:g} MiB")
    left.set(xlabel="sequence length N", ylabel="peak memory per rank, MiB")
    left.set_title("Memory of a rank: measured, fitted, and extrapolated (dotted)")

    for name in STRATEGIES:
        rows = [row for row in result["series"] if row["subject"] == name]
        right.plot([r["ranks"] for r in rows], [r["longest"] for r in rows], color=colours[name])
        for row in rows:
            face = "white" if row["is_extrapolated"] else colours[name]
            right.plot(
                row["ranks"], row["longest"], color=colours[name], zorder=3,
                marker="o" if name == "ring" else "s", ms=8, mfc=face,
            )  # fmt: skip
        right.plot([], [], "o" if name == "ring" else "s", color=colours[name], ls="-", label=name)
    for row in result["series"]:
        if row["subject"] not in STRATEGIES:
            right.axhline(
                row["longest"], color=colours[row["subject"]], ls="--",
                label=f"{row['subject']}: {row['longest']:,}",
            )  # fmt: skip
    right.plot([], [], "o", color="#777777", mfc="white", ls="", label="extrapolated by the fit")
    right.set(xlabel="ranks P", ylabel="longest N")
    right.set_title(f"Longest sequence in {memory:g} MiB per rank")
    for axes, ticks in ((left.xaxis, _powers(ends)), (right.xaxis, all_ranks)):
        axes.axes.set(xscale="log", yscale="log")
        axes.set_ticks(ticks)
    right.set_yticks(_powers([r["longest"] for r in result["series"]]))
    left.set_yticks(_powers([x / MIB for r in result["series"] for _, x in r["points"]] + [memory]))
    for axes in (left, right):
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _powers(values: Sequence[float]) -> list[int]:
    """The powers of two from just below to just above the positive ones of the values."""
    kept = [max(1, int(x)) for x in values if x > 0]
    return [2**n for n in range(min(kept).bit_length() - 1, max(kept).bit_length() + 1)]


def main() -> None:
    """Parses arguments, measures, prints; fails when memory does not fall with P or a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-mib", type=float, default=64, help="of a rank (%(default)s)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--d", type=int, default=32, help="width of a head")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--repeats", type=int, default=1, help="measure so often, take the median")
    parser.add_argument(
        "--verify", action="store_true",
        help="measure most ranks at the longest N, or at 4 times the longest measured if that is less",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, help="draw into this file")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if len(set(args.lengths)) < 3:
        parser.error(
            f"--lengths must be three or more, to see how well a line fits: {args.lengths}"
        )
    if min(*args.lengths, *args.ranks, args.repeats, args.heads, args.d) < 1:
        parser.error("lengths, ranks, repeats, heads and d must be at least 1")

    setting = Setting(args.heads, args.d, args.dtype)
    result = study(args.lengths, args.ranks, args.memory_mib, setting, args.repeats)
    if args.verify:
        result["verified"] = verify(result)
    result["failures"] = failures(result)
    show(result, Console())
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(result, args.plot)
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
