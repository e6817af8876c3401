"""Every grid of the mesh: how many columns there can be, which is best, and what each sends."""

from __future__ import annotations

from typing import Any

from sent_by_strategy.routes import Way, derived, summary
from seqpar import Mask
from seqpar.calls import Shape
from seqpar.layout import LAYOUTS


def columns(ranks: int) -> list[int]:
    """Of every grid."""
    return [n for n in range(1, ranks + 1) if ranks % n == 0]


def best_grid(ranks: int, length: int, shape: Shape) -> int:
    """The columns of the mesh that sends least in a step, two or more of them where there can be."""
    some = columns(ranks)[1:] or [1]
    layout = LAYOUTS["contiguous"](length, ranks)
    return min(
        some, key=lambda c: summary(derived(Way("mesh", c), ranks, layout, Mask(), shape))["step_bytes"]
    )  # fmt: skip


def grids(ranks: int, length: int, shape: Shape) -> dict[str, Any]:
    """Every grid of the mesh with a full mask, and its ratio to ring and all-gather."""
    layout = LAYOUTS["contiguous"](length, ranks)

    def sent(way: Way) -> dict[str, float]:
        return summary(derived(way, ranks, layout, Mask(), shape))

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
