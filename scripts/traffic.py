"""What every strategy sends: against the textbook volume, by grid, by number of ranks, with a window.

Four parts. `volumes`: bytes per rank of every strategy beside the volume of its textbook form, which
skips no hop and never lets queries travel. `grids`: every grid of the mesh against ring and all-gather.
`least`: which strategy sends least. `windowed`: bytes and CPU time of a rank where rows see a window.

Bytes of `volumes`, `grids` and `least` follow from the published formulas at `--length`; every row of
`volumes` is also counted in an in-process world at a small length with the same heads. `windowed` is
counted and timed: CPU seconds of the median rank's thread, waiting left out. A rank's bytes are those it
sends; sums and statistics are float32.

Example: python scripts/traffic.py --heads 32 8 --ranks 4 16 --parts volumes grids
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from seqpar import Group, Mask, Plan, attention, simulate
from seqpar.layout import LAYOUTS, Layout, visible_count
from seqpar.strategies import STRATEGY_NAMES, VOLUMES, Shape, Strategy, Volume, resolve
from seqpar.testing import run_step

PARTS = ("volumes", "grids", "least", "windowed")
SETTINGS = [(Mask(), "contiguous"), *((Mask(causal=True), kind) for kind in LAYOUTS)]
COUNTED_ROWS, COUNTED_D = 4, 16  # of a rank and of a head where bytes are counted
TILE_ROWS = 64  # of a rank, where bits must not depend on the number of ranks
ZIGZAG_RANKS = 16  # `least` with a causal mask stops here: pieces of 64 ranks take minutes to list
HEADS_WITH_WINDOW, D_WITH_WINDOW = (2, 1), 64
MASKS = {"full causal ring, zigzag": ("ring", "zigzag", False),
         "windowed ring, contiguous": ("ring", "contiguous", True),
         "windowed all-gather, contiguous": ("allgather", "contiguous", True)}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A strategy, on a grid of so many columns (the mesh) or Ulysses ranks (the hybrid)."""

    strategy: Strategy
    columns: int = 0
    invariant: bool = False

    def name(self, ranks: int) -> str:
        """As it is printed."""
        grid = f" {ranks // self.columns} x {self.columns}" if self.columns else ""
        return self.strategy.replace("_", " ") + grid + ", in order" * self.invariant

    def plan(self, group: Group, layout: Layout, mask: Mask) -> Plan:
        """Its plan; with the reference kernels, which like Triton's need no `out` in backward."""
        grid = group.grid(ulysses=self.columns) if self.columns else None
        return Plan(
            group, layout, mask, strategy=self.strategy, implementation="reference",
            invariant=self.invariant, grid=grid,
        )  # fmt: skip


def groups(ranks: int) -> list[Group]:
    """The groups of a world, to ask formulas with."""
    return simulate(ranks, lambda group: group)


def formula(way: Way, ranks: int, layout: Layout, mask: Mask, shape: Shape) -> list[Volume]:
    """What ranks send; all, or one that stands for all where pieces are many and everything is even."""
    stands_for_all = mask == Mask() and len(set(layout.rows)) == 1
    some = groups(ranks)[: 1 if stands_for_all and way.strategy in ("allgather", "mesh") else None]
    volume = VOLUMES[way.strategy]
    return [volume(way.plan(group, layout, mask), group.rank, shape) for group in some]


def counts_agree(way: Way, ranks: int, kind: str, mask: Mask, heads: tuple[int, int]) -> bool:
    """Whether a small step sends what the formula says, on every rank."""

    def step(group: Group) -> bool:
        rows = TILE_ROWS if way.invariant else COUNTED_ROWS
        layout = LAYOUTS[kind](rows * ranks, ranks)
        q, k, v, dout = (
            torch.randn(1, rows, heads[n], COUNTED_D).to(torch.bfloat16) for n in (0, 1, 1, 0)
        )
        done = run_step(q, k, v, dout, way.plan(group, layout, mask))
        return done.sent == done.formula

    return all(simulate(ranks, step))


def textbook(way: Way, ranks: int, length: int, shape: Shape) -> tuple[float, float] | None:
    """Bytes per rank forward and backward in the textbook form, for a full mask and even shards.

    `None` for the hybrid, which has two, and where additions are in order, which the textbook knows not.
    """
    n_q, n_k, d, f = shape.hq, shape.hkv, shape.d, Fraction(ranks - 1, ranks)
    hq, hk = n_q * d, n_k * d
    exchange = f / ranks * length
    traded = exchange * (2 * hq + 2 * max(n_k, ranks) * d)
    kv, scores = 2 * f * length * hk, 2 * f * n_q * length**2
    # (narrow forward, wide forward, narrow backward, wide backward), elements
    table: dict[str, tuple[Any, Any, Any, Any]] = {
        "ring": (kv, 0, kv, 2 * length * hk),
        "ulysses": (traded, 0, traded, 0),
        "allgather": (kv, 0, kv, kv),
        "materialised_rows": (kv, 0, kv / 2, kv),
        "materialised_columns": (
            f * length * hq, f * length * (hq + 4 * n_q), f * length * hq, f * length * (hq + n_q),
        ),
        "materialised_depth": (
            exchange * (2 * hq + 2 * hk), scores, exchange * (2 * hq + 2 * hk), scores + f * length * n_q,
        ),
    }  # fmt: skip
    if way.strategy == "mesh":
        rows, more, rank = ranks // way.columns - 1, way.columns - 1, Fraction(length, ranks)
        table["mesh"] = (
            rank * (more * hq + rows * 2 * hk), rank * more * (hq + 2 * n_q),
            rank * (more * 2 * hq + rows * 2 * hk), rank * (more * (hq + 2 * n_q) + rows * 2 * hk),
        )  # fmt: skip
    if way.strategy not in table or way.invariant:
        return None
    a, b, c, e = table[way.strategy]
    narrow, wide = (shape.count(1, wide=w).bytes for w in (False, True))
    return float(narrow * a + wide * b), float(narrow * c + wide * e)


def summary(volumes: Sequence[Volume]) -> dict[str, float]:
    """Bytes of the mean and of the busiest rank."""
    both = [v.forward + v.backward for v in volumes]
    named = {"forward": [v.forward for v in volumes], "backward": [v.backward for v in volumes]}
    result = {}
    for name, counts in (named | {"step": both}).items():
        result[f"{name}_bytes"] = statistics.fmean(c.bytes for c in counts)
        result[f"{name}_busiest_bytes"] = max(c.bytes for c in counts)
        result[f"{name}_elements"] = statistics.fmean(c.elements for c in counts)
    return result


def columns(ranks: int) -> list[int]:
    """Of every grid."""
    return [n for n in range(1, ranks + 1) if ranks % n == 0]


def best_grid(ranks: int, length: int, shape: Shape) -> int:
    """The columns of the mesh that sends least in a step, two or more of them where there can be."""
    some = columns(ranks)[1:] or [1]
    layout = LAYOUTS["contiguous"](length, ranks)
    return min(
        some, key=lambda c: summary(formula(Way("mesh", c), ranks, layout, Mask(), shape))["step_bytes"]
    )  # fmt: skip


def volumes(ranks: int, length: int, shape: Shape) -> list[dict[str, Any]]:
    """Every strategy, for a full mask and a causal one under every layout."""
    sized = {"mesh": best_grid(ranks, length, shape), "hybrid": (columns(ranks)[1:] or [1])[0]}
    ways = [Way(name, sized.get(name, 0)) for name in STRATEGY_NAMES]
    in_order = [Way(name, invariant=True) for name in ("ring", "ulysses", "allgather")]  # type: ignore[arg-type]
    rows = []
    for mask, kind in SETTINGS:
        for way in ways + (in_order if mask.causal and kind == "contiguous" else []):
            found = summary(formula(way, ranks, LAYOUTS[kind](length, ranks), mask, shape))
            base = textbook(way, ranks, length, shape)
            row = {
                "strategy": way.strategy, "name": way.name(ranks), "ranks": ranks, "causal": mask.causal,
                "layout": kind, "heads": [shape.hq, shape.hkv], **found,
                "counted_is_formula": counts_agree(way, ranks, kind, mask, (shape.hq, shape.hkv)),
            }  # fmt: skip
            if base is not None:
                whole = sum(base) or 1.0
                row |= {
                    "textbook_forward_bytes": base[0], "textbook_backward_bytes": base[1],
                    "below": 1 - found["step_bytes"] / whole if ranks > 1 else 0.0,
                    "busiest_below": 1 - found["step_busiest_bytes"] / whole if ranks > 1 else 0.0,
                }  # fmt: skip
            rows.append(row)
    return rows


def grids(ranks: int, length: int, shape: Shape) -> dict[str, Any]:
    """Every grid of the mesh with a full mask, and its ratio to ring and all-gather."""
    layout = LAYOUTS["contiguous"](length, ranks)

    def sent(way: Way) -> dict[str, float]:
        return summary(formula(way, ranks, layout, Mask(), shape))

    others = {name: sent(Way(name)) for name in ("ring", "allgather")}  # type: ignore[arg-type]
    rows = []
    for c in columns(ranks):
        found = sent(Way("mesh", c))
        of = {
            f"{part}_{unit}_of_{name}": found[f"{part}_{unit}"] / (other[f"{part}_{unit}"] or 1)
            for name, other in others.items()
            for part in ("forward", "step")
            for unit in ("elements", "bytes")
        }
        rows.append({"rows": ranks // c, "columns": c, **found, **of})
    best = min(rows, key=lambda row: row["step_bytes"])
    heads = [shape.hq, shape.hkv]
    return {
        "ranks": ranks,
        "heads": heads,
        **others,
        "grids": rows,
        "best": [best["rows"], best["columns"]],
    }


def least(ranks: int, length: int, shape: Shape) -> list[dict[str, Any]]:
    """Who sends least on its busiest rank, full and, as far as that is quick, causal under zigzag."""
    inner = [c for c in columns(ranks) if 1 < c < ranks]
    results = []
    for mask, kind in (SETTINGS[0], SETTINGS[2]):
        if mask.causal and ranks > ZIGZAG_RANKS:
            continue
        meshes = [Way("mesh", c) for c in columns(ranks)[1:]]
        if mask.causal and meshes:
            meshes = [Way("mesh", best_grid(ranks, length, shape))]
        ways = [Way("ring"), Way("ulysses"), Way("allgather"), *meshes]
        ways += [Way("hybrid", c) for c in inner]
        best: dict[str, dict[str, Any]] = {}
        for way in ways:
            found = summary(formula(way, ranks, LAYOUTS[kind](length, ranks), mask, shape))
            row = {"strategy": way.strategy, "name": way.name(ranks), **found}
            before = best.get(way.strategy)
            if before is None or row["step_busiest_bytes"] < before["step_busiest_bytes"]:
                best[way.strategy] = row
        rows = sorted(best.values(), key=lambda row: row["step_busiest_bytes"])
        heads = [shape.hq, shape.hkv]
        results.append(
            {"ranks": ranks, "heads": heads, "causal": mask.causal, "layout": kind, "ways": rows}
        )
    return results


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
        said = VOLUMES[plan.strategy](resolve(plan, q, v), group.rank, Shape.of(q, k, v))
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
        "counted_is_formula": sent == [x[2] for x in runs[-1]],
    }  # fmt: skip


def windowed(
    rows: int, window: int, all_ranks: Sequence[int], rounds: int, progress: Progress
) -> dict[str, Any]:
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
    task = progress.add_task("windowed", total=len(places))
    windowed_point(next(iter(MASKS)), 2, 64, window, 1)  # warms up
    points = []
    for series, ranks, length, name in places:
        many = rounds if MASKS[name][2] else 1  # the full ring is long enough
        points.append({"series": series, **windowed_point(name, ranks, length, window, many)})
        progress.advance(task)
    return {"rows": rows, "window": window, "fixed_ranks": fixed, "rounds": rounds,
            "heads": HEADS_WITH_WINDOW, "d": D_WITH_WINDOW, "dtype": "float32", "points": points}  # fmt: skip


def failures(result: dict[str, Any]) -> list[str]:
    """What must not be, in words."""
    wrong = []
    for row in result.get("volumes", []):
        where = f"{row['name']}, {'causal' if row['causal'] else 'full'} {row['layout']}, P={row['ranks']}"
        if not row["counted_is_formula"]:
            wrong.append(f"{where}: counted bytes differ from the formula")
        if row["strategy"] in ("ring", "ulysses") and "below" in row:
            for part in ("forward", "backward"):
                found, base = row[f"{part}_busiest_bytes"], row[f"textbook_{part}_bytes"]
                if found > base:
                    wrong.append(f"{where}: {part} {found:,.0f} bytes, the textbook {base:,.0f}")
    points = result.get("windowed", {}).get("points", [])
    wrong += [
        f"{p['name']}, P={p['ranks']}, N={p['length']}: counted bytes differ from the formula"
        for p in points
        if not p["counted_is_formula"]
    ]
    steady = [
        p
        for p in points
        if p["series"].startswith("rows") and p["name"].startswith("windowed ring")
    ]
    inside = {
        p["busiest_bytes"] for p in steady if p["ranks"] > 2
    }  # of two ranks, both are at an end
    if len(inside) > 1 or len({p["busiest_scores"] for p in steady}) > 1:
        wrong.append(f"a windowed ring's bytes or scores per rank depend on P: {steady}")
    return wrong


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the parts as tables."""
    for mask, kind in SETTINGS:
        for heads in {tuple(row["heads"]): None for row in result.get("volumes", [])}:
            rows = [
                row for row in result["volumes"]
                if row["causal"] == mask.causal and row["layout"] == kind and tuple(row["heads"]) == heads
            ]  # fmt: skip
            label = f"{'causal' if mask.causal else 'full'} {kind}, heads {heads[0]}/{heads[1]}"
            table = _table(
                f"{label}, P={rows[0]['ranks']}, N={result['length']}, MB per rank",
                "", "forward", "backward", "busiest", "textbook", "below", "busiest below",
            )  # fmt: skip
            for row in rows:
                last = ["-"] * 3
                if "below" in row:
                    base = row["textbook_forward_bytes"] + row["textbook_backward_bytes"]
                    last = [_mb(base), f"{row['below']:.1%}", f"{row['busiest_below']:.1%}"]
                sent = (row[f"{n}_bytes"] for n in ("forward", "backward", "step_busiest"))
                table.add_row(row["name"], *map(_mb, sent), *last)
            console.print(table)
    for found in result.get("grids", []):
        table = _table(
            f"mesh, full, heads {found['heads'][0]}/{found['heads'][1]}, P={found['ranks']}; best "
            f"{found['best'][0]} x {found['best'][1]}",
            "R x C", "forward MB", "backward MB", "of ring", "of all-gather", "forward elements of ring",
        )  # fmt: skip
        for row in found["grids"]:
            ratios = (row[f"{n}_ring"] for n in ("step_bytes_of", "forward_elements_of"))
            first, last = (f"{x:.3f}" for x in ratios)
            table.add_row(
                f"{row['rows']} x {row['columns']}", _mb(row["forward_bytes"]), _mb(row["backward_bytes"]),
                first, f"{row['step_bytes_of_allgather']:.3f}", last,
            )  # fmt: skip
        console.print(table)
    if "least" in result:
        table = _table("who sends least: MB of the busiest rank, forward + backward", "heads", "P", "mask",
                       *("1st", "2nd", "3rd", "4th", "5th"))  # fmt: skip
        for found in result["least"]:
            mask_name = f"{'causal' if found['causal'] else 'full'} {found['layout']}"
            ways = [f"{w['name']} {_mb(w['step_busiest_bytes'])}" for w in found["ways"]]
            table.add_row("{}/{}".format(*found["heads"]), str(found["ranks"]), mask_name, *ways)
        console.print(table)
    if "windowed" in result:
        table = _table(
            f"causal, window {result['windowed']['window']}: busiest rank, CPU of the median one",
            "series", "", "P", "N", "MB", "scores", "CPU ms",
        )  # fmt: skip
        for p in result["windowed"]["points"]:
            table.add_row(
                p["series"], p["name"], str(p["ranks"]), str(p["length"]), f"{p['busiest_bytes'] / 1e6:.3f}",
                f"{p['busiest_scores']:,}", f"{1e3 * p['seconds']:.1f}",
            )  # fmt: skip
        console.print(table)


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


def _table(title: str, *names: str) -> Table:
    table = Table(title=title)
    for n, name in enumerate(names):
        table.add_column(name, justify="right" if n else "left")
    return table


def _mb(x: float) -> str:
    return f"{x / 1e6:,.1f}"


def main() -> None:
    """Parses arguments, computes, counts, prints; fails when one of the `failures` is found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--heads", type=int, nargs=2, action="append", metavar=("QUERY", "KV"),
        help="may be given again (32 8 and 32 32)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[4, 8, 16, 64], help="`volumes` takes the first"
    )
    parser.add_argument("--length", type=int, default=131072, help="tokens, for the formulas")
    parser.add_argument("--d", type=int, default=128, help="width of a head, for the formulas")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--window", type=int, default=1024, help="keys a row sees, itself included")
    parser.add_argument("--rows", type=int, default=2048, help="of a rank, with a window")
    parser.add_argument("--windowed-ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument(
        "--rounds", type=int, default=3, help="of windowed steps; the median counts"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--plot", type=Path, help="draw the windowed part into this file")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    all_heads = args.heads or [[32, 8], [32, 32]]
    numbers = (
        *args.ranks,
        *args.windowed_ranks,
        args.length,
        args.d,
        args.window,
        args.rows,
        args.rounds,
    )
    if min(*numbers, *(n for heads in all_heads for n in heads)) < 1:
        parser.error("heads, ranks, length, d, window, rows and rounds must be at least 1")
    if any(hq % hkv for hq, hkv in all_heads):
        parser.error(f"query heads must be a multiple of kv heads, got {all_heads}")
    if args.plot and "windowed" not in args.parts:
        parser.error("--plot draws the windowed part; add it to --parts")

    torch.set_num_threads(1)
    shapes = [Shape(1, *heads, args.d, args.d, getattr(torch, args.dtype)) for heads in all_heads]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(), "python": platform.python_version(),
        "torch": torch.__version__, "command": " ".join(["traffic.py", *sys.argv[1:]]),
        "length": args.length, "d": args.d, "dtype": args.dtype,
    }  # fmt: skip
    with Progress(console=Console(stderr=True)) as progress:
        for part in args.parts:
            if part == "windowed":
                result[part] = windowed(
                    args.rows, args.window, sorted(args.windowed_ranks), args.rounds, progress
                )
                continue
            result[part] = []
            all_ranks = args.ranks[:1] if part == "volumes" else args.ranks
            for ranks, shape in progress.track(
                [(p, s) for s in shapes for p in all_ranks], description=part
            ):
                if part == "grids":
                    result[part].append(grids(ranks, args.length, shape))
                else:
                    made = volumes if part == "volumes" else least
                    result[part] += made(ranks, args.length, shape)
    result["failures"] = failures(result)
    show(result, Console())
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        plot(result["windowed"], args.plot)
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
