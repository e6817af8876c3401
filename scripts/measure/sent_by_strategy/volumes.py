"""All strategies side by side: what each sends beside its textbook form, and which sends least."""

from __future__ import annotations

from typing import Any

from sent_by_strategy.grids import best_grid, columns
from sent_by_strategy.routes import Way, counts_agree, derived, summary
from sent_by_strategy.textbook import textbook
from seqpar import Mask
from seqpar.calls import Shape
from seqpar.layout import LAYOUTS
from seqpar.strategies import STRATEGIES

SETTINGS = [(Mask(), "contiguous"), *((Mask(causal=True), kind) for kind in LAYOUTS)]
ZIGZAG_RANKS = 16  # `least` with a causal mask stops here: pieces of 64 ranks take minutes to list


def volumes(ranks: int, length: int, shape: Shape) -> list[dict[str, Any]]:
    """Every strategy, for a full mask and a causal one under every layout."""
    sized = {"mesh": best_grid(ranks, length, shape), "hybrid": (columns(ranks)[1:] or [1])[0]}
    ways = [Way(name, sized.get(name, 0)) for name in STRATEGIES]
    in_order = [Way(name, invariant=True) for name in ("ring", "ulysses", "allgather")]  # type: ignore[arg-type]
    rows = []
    for mask, kind in SETTINGS:
        for way in ways + (in_order if mask.causal and kind == "contiguous" else []):
            found = summary(derived(way, ranks, LAYOUTS[kind](length, ranks), mask, shape))
            base = textbook(way, ranks, length, shape)
            row = {
                "strategy": way.strategy, "name": way.name(ranks), "ranks": ranks, "causal": mask.causal,
                "layout": kind, "heads": [shape.hq, shape.hkv], **found,
                "counted_is_derived": counts_agree(way, ranks, kind, mask, (shape.hq, shape.hkv)),
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
            found = summary(derived(way, ranks, LAYOUTS[kind](length, ranks), mask, shape))
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
