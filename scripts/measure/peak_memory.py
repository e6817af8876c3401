"""Measures the peak memory of a rank against N and P, and the longest sequence that then fits.

Forward and backward of causal attention: every strategy on P ranks, and one device with its N x N
scores stored and not. Each measurement is made in processes of its own, after a tiny step that
starts threads and connections; it counts the rank's own q, k, v, dout and gradients, and the rank
that needs most counts. A line (with stored scores a parabola) is fitted to the measured lengths and
says how long a sequence fits `--memory-mib` per rank.

Freed tensors go back to the system at once, as they do above 32 MiB whatever is set. glibc would
keep many of the small ones measured here in its heap: 5 to 35 % more, another share at every
length. `--mmap-threshold-kib 0` lets it. Linux with glibc only.

Example: python scripts/measure/peak_memory.py --memory-mib 256 --verify --plot memory.png
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from seqpar import Group, Mask, Plan, attention
from seqpar.commands import progress
from seqpar.layout import LAYOUTS
from seqpar.testing import PeakMemory, ProcessWorld
from seqpar.testing.memory import give_back_freed

MIB = 2**20
STRATEGIES = {"ring": "zigzag", "ulysses": "contiguous"}  # strategy -> the layout it likes best
STORED, NOT_STORED = "one device, scores stored", "one device, scores not stored"
STORED_LIMIT_BYTES = 4 * 2**30  # lengths for which stored scores would need more are left out
WARM_UP_ROWS = 8  # of a rank
VERIFY_FACTOR = 4  # `--verify` goes no further than this times the longest measured length
VERIFY_TOLERANCE = 0.15  # lines were 4 to 8 % too high at 32768, fitted up to 8192


@dataclass(frozen=True)
class Setting:
    """The tensors of a step: few heads, because memory is studied and not speed.

    Args:
        mmap_threshold_bytes: allocations from this size on are mappings of their own; 0 leaves that
            to glibc, which raises its threshold whenever a mapping is freed.
    """

    heads: int = 4
    d: int = 32
    dtype: str = "float32"
    mmap_threshold_bytes: int = 64 * 2**10


@dataclass(frozen=True)
class Fit:
    """bytes = sum of coefficients[n] * N**n, none negative; `misfit` is the worst relative one."""

    coefficients: tuple[float, ...]
    misfit: float

    def at(self, length: float) -> float:
        """The bytes at a length."""
        return sum(c * length**n for n, c in enumerate(self.coefficients))


def attention_with_stored_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on `[b h s d]` whose softmax of all scores waits for backward."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ v


ONE_DEVICE: dict[str, Callable[..., Tensor]] = {
    NOT_STORED: partial(F.scaled_dot_product_attention, is_causal=True),
    STORED: attention_with_stored_scores,
}


def stored_bytes(length: int, setting: Setting) -> int:
    """About what stored scores need: three copies in the backward of softmax, and the mask."""
    item = torch.empty(0, dtype=getattr(torch, setting.dtype)).element_size()
    return length**2 * (3 * setting.heads * item + 1)


def step(group: Group, subject: str, length: int, setting: Setting) -> None:
    """Forward and backward of a subject on this rank's rows of random tensors."""
    attend: Callable[..., Tensor]
    if subject in STRATEGIES:
        layout = LAYOUTS[STRATEGIES[subject]](length, group.size)
        plan = Plan(group, layout, Mask(causal=True), strategy=subject)  # type: ignore[arg-type]
        attend = partial(attention, plan=plan)
        shape = 1, layout.rows[group.rank], setting.heads, setting.d
    else:
        attend, shape = ONE_DEVICE[subject], (1, setting.heads, length, setting.d)
    dtype = getattr(torch, setting.dtype)
    q, k, v, dout = (torch.randn(shape, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(attend(*leaves), leaves, dout)


def step_bytes(group: Group, subject: str, length: int, setting: Setting) -> int:
    """Peak growth of this process in bytes over one step."""
    if setting.mmap_threshold_bytes:
        give_back_freed(setting.mmap_threshold_bytes)
    step(group, subject, WARM_UP_ROWS * group.size, setting)
    with PeakMemory() as peak:
        step(group, subject, length, setting)
    return peak.bytes


def measure(subject: str, length: int, ranks: int, setting: Setting) -> int:
    """Peak bytes of the rank that needs most, in fresh processes."""
    with ProcessWorld(ranks) as world:
        return max(world.run(step_bytes, subject, length, setting, timeout=600.0))


def fit(points: Sequence[tuple[int, int]], degree: int) -> Fit:
    """The polynomial in N nearest to (N, bytes) of those that have no negative coefficient.

    Nearest by the squares of the relative distances, so that all lengths count alike.

    Raises:
        ValueError: fewer than `degree` + 1 points.
    """
    if len(points) <= degree:
        raise ValueError(f"a fit of degree {degree} takes {degree + 1} lengths, got {len(points)}")
    lengths, peaks = torch.tensor(points, dtype=torch.float64).unbind(1)
    system = lengths[:, None] ** torch.arange(degree + 1) / peaks[:, None]
    size = system.amax(0)  # columns of one size keep it well conditioned
    found: list[tuple[float, Fit]] = []
    for num_lower in range(degree + 1):
        for kept in ([*lower, degree] for lower in combinations(range(degree), num_lower)):
            solution = torch.linalg.lstsq(
                system[:, kept] / size[kept], torch.ones_like(peaks)[:, None]
            ).solution[:, 0]
            coefficients = torch.zeros_like(size)
            coefficients[kept] = solution / size[kept]
            off = system @ coefficients - 1
            if bool((coefficients >= 0).all()):
                fitted = Fit(tuple(coefficients.tolist()), float(off.abs().max()))
                found.append((float(off @ off), fitted))
    return min(found, key=lambda pair: pair[0])[1]


def longest(fitted: Fit, memory_bytes: float) -> int:
    """The longest N whose fitted bytes fit the memory; 0 if none does."""
    return max(0, bisect.bisect_right(range(2**40), memory_bytes, key=fitted.at) - 1)


def study(
    lengths: Sequence[int],
    ranks: Sequence[int],
    memory_mib: float,
    setting: Setting,
    repeats: int = 1,
) -> dict[str, Any]:
    """Measures every subject at every length, median of `repeats`, and fits: what the JSON holds."""
    lengths, ranks = sorted(set(lengths)), sorted(set(ranks))
    small = [n for n in lengths if stored_bytes(n, setting) <= STORED_LIMIT_BYTES]
    notes = [
        f"{STORED}: N = {n:,} would need {stored_bytes(n, setting) / 2**30:.1f} GiB, not measured"
        for n in lengths[len(small) :]
    ]
    subjects = [(name, p) for name in STRATEGIES for p in ranks] + [(NOT_STORED, 1)]
    if len(small) >= 3:
        subjects.append((STORED, 1))
    else:
        notes.append(f"{STORED}: left out, a parabola takes three lengths")
    jobs = [(*s, n) for s in subjects for n in (small if s[0] == STORED else lengths)]
    points: dict[tuple[str, int], list[tuple[int, int]]] = {s: [] for s in subjects}
    for subject, p, length in progress.track(
        jobs, "peak memory", name=lambda job: f"{job[0]}, P={job[1]}, N={job[2]}"
    ):
        peaks = [measure(subject, length, p, setting) for _ in range(repeats)]
        points[subject, p].append((length, int(statistics.median(peaks))))
    series = []
    for (subject, p), measured in points.items():
        fitted = fit(measured, 2 if subject == STORED else 1)
        row = {"subject": subject, "ranks": p, "points": measured, "fit": asdict(fitted)}
        fits = longest(fitted, memory_mib * MIB)
        is_extrapolated = not measured[0][0] <= fits <= measured[-1][0]
        series.append(row | {"longest": fits, "is_extrapolated": is_extrapolated})
    return {
        "setting": asdict(setting), "memory_mib": memory_mib, "repeats": repeats, "notes": notes,
        "series": series,
    }  # fmt: skip


def verify(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures the strategies with most ranks at the longest N, or as far as `--verify` goes."""
    checks, most = [], max(row["ranks"] for row in result["series"])
    for row in result["series"]:
        if row["subject"] in STRATEGIES and row["ranks"] == most and row["longest"]:
            check = {key: row[key] for key in ("subject", "ranks", "longest")}
            length = min(row["longest"], VERIFY_FACTOR * row["points"][-1][0])
            check |= {"length": length, "predicted_bytes": Fit(**row["fit"]).at(length)}
            setting = Setting(**result["setting"])
            checks.append(check | {"bytes": measure(row["subject"], length, most, setting)})
    return checks


def failures(result: dict[str, Any]) -> list[str]:
    """What is not as it should be: memory that does not fall with P, predictions that are wrong."""
    found = []
    for name in STRATEGIES:
        rows = [row for row in result["series"] if row["subject"] == name]
        for few, many in pairwise(rows):
            (length, before), (_, after) = few["points"][-1], many["points"][-1]
            if after >= before:
                found.append(
                    f"{name} at N = {length:,} needs {before / MIB:.1f} MiB per rank with P = "
                    f"{few['ranks']} and {after / MIB:.1f} MiB with P = {many['ranks']}"
                )
    for check in result.get("verified", []):
        if abs(check["bytes"] / check["predicted_bytes"] - 1) > VERIFY_TOLERANCE:
            found.append(f"the fit of {check['subject']} is wrong at N = {check['length']:,}")
    return found


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the measurements, the fits, and what `verify` found."""
    setting, memory = result["setting"], f"{result['memory_mib']:g} MiB"
    lengths = [n for n, _ in result["series"][0]["points"]]
    measured = Table(
        title=f"peak MiB per rank, forward + backward, causal, {setting['dtype']}, "
        f"{setting['heads']} heads of {setting['d']}"
    )
    fits = Table(title="bytes = a + b N + c N^2", caption="* extrapolated by the fit")
    for table, columns in (
        (measured, [f"N={n}" for n in lengths]),
        (fits, ["a MiB", "b", "c", "misfit", f"longest N\nin {memory}"]),
    ):
        table.add_column("")
        for column in ["P", *columns]:
            table.add_column(column, justify="right")
    for row in result["series"]:
        who, peaks = (row["subject"], str(row["ranks"])), dict(row["points"])
        measured.add_row(*who, *(f"{peaks[n] / MIB:.1f}" if n in peaks else "-" for n in lengths))
        a, b, *c = row["fit"]["coefficients"]
        fits.add_row(
            *who, f"{a / MIB:.2f}", f"{b:.0f}", f"{c[0]:.1f}" if c else "", f"{row['fit']['misfit']:.1%}",
            f"{row['longest']:,} {'*' if row['is_extrapolated'] else ' '}",
        )  # fmt: skip
    console.print(measured, fits, *result["notes"], sep="\n")
    for check in result.get("verified", []):
        predicted, peak = check["predicted_bytes"], check["bytes"]
        is_longest = check["length"] == check["longest"]
        console.print(
            f"{check['subject']}, P = {check['ranks']}, N = {check['length']:,}"
            f"{'' if is_longest else ' (the longest is too far to check)'}: predicted "
            f"{predicted / MIB:.1f} MiB, measured {peak / MIB:.1f} ({peak / predicted - 1:+.1%})"
        )


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


def main() -> None:
    """Parses arguments, measures, prints; fails when one of the `failures` is found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-mib", type=float, default=64.0, help="per rank (%(default)s)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--d", type=int, default=32, help="width of a head")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--mmap-threshold-kib", type=int, default=64, help="0: glibc's own")
    parser.add_argument("--repeats", type=int, default=1, help="measure so often, take the median")
    parser.add_argument(
        "--verify", action="store_true",
        help=f"also measure the longest N, or {VERIFY_FACTOR} x the longest of --lengths if shorter",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, help="draw into this file")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if len(set(args.lengths)) < 3:
        parser.error(f"a line has a misfit from three lengths on, got --lengths {args.lengths}")
    if min(*args.lengths, *args.ranks, args.repeats, args.heads, args.d) < 1:
        parser.error("lengths, ranks, repeats, heads and d must be at least 1")

    setting = Setting(args.heads, args.d, args.dtype, args.mmap_threshold_kib * 2**10)
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
