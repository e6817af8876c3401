"""What was found, put together over ranks and rounds: rows, what must not be, and tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kernel_race.sheet import Sheet
from torch import Tensor

from gemma_policies.measured import JOBS
from gemma_policies.ways import Way

TOLERANCE = 5e-6  # the norms of the model compute in float32, whatever its weights are


def differences(got: Sequence[dict[str, Tensor]], want: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of any rank from one process, over the largest value."""
    return {
        name: max(float((x[name] - whole).abs().max() / whole.abs().max()) for x in got)
        for name, whole in want.items()
    }


def row(
    way: Way,
    found: Sequence[dict[str, Tensor]],
    want: dict[str, Tensor],
    counted: Sequence[dict[str, Any]],
    held: Sequence[dict[str, int]],
) -> dict[str, Any]:
    """One policy on as many ranks as there are results; without its times."""
    first = counted[0]
    return {
        "ranks": len(found), "policy": way.label, "differences": differences(found, want),
        "jobs": {job: {k: first[job][k] for k in ("calls", "counted", "formula")} for job in first},
        "counted_is_formula": all(c[job]["is_formula"] for c in counted for job in c),
        "held_bytes": {k: max(h[k] for h in held) for k in held[0]},
    }  # fmt: skip


def spent(rounds: Sequence[Sequence[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Milliseconds of the slowest rank: the median over rounds and the least."""
    slowest = [{what: max(r[what] for r in ranks) for what in ranks[0]} for ranks in rounds]
    return {
        "ms": {what: statistics.median(r[what] for r in slowest) for what in slowest[0]},
        "least_ms": {what: min(r[what] for r in slowest) for what in slowest[0]},
    }


def failures(rows: Sequence[dict[str, Any]], projections: Sequence[dict[str, Any]]) -> list[str]:
    """What must not be, in words."""
    wrong = []
    for r in rows:
        where = f"P={r['ranks']}, {r['policy']}"
        for what, difference in r["differences"].items():
            allowed = 0 if what == "tokens" else TOLERANCE
            if not difference <= allowed:
                wrong.append(f"{where}: {what} differ from one process by {difference:.1e}")
        if not r["counted_is_formula"]:
            wrong.append(f"{where}: counted elements differ from the closed form")
    for p in projections:
        if p["counted"] != p["formula"]:
            what = (
                f"{p['inputs']} to {p['outputs']} by {p['by']}, x {p['arrives']}, y {p['wanted']}"
            )
            wrong.append(f"P={p['ranks']}, {what}: counted {p['counted']}, formula {p['formula']}")
    return wrong


def sheets(rows: Sequence[dict[str, Any]]) -> list[Sheet]:
    """The tables."""
    first = ("P", "policy")
    labels = [(str(r["ranks"]), r["policy"]) for r in rows]
    milliseconds = [
        tuple(f"{r['ms'][job]:,.0f} ({r['least_ms'][job]:,.0f})" for job in JOBS) for r in rows
    ]
    calls = [
        tuple(_pair([sum(x.values()) for x in r["jobs"][job]["calls"]], job) for job in JOBS)
        for r in rows
    ]
    sent = [
        tuple(_pair([sum(x.values()) for x in r["jobs"][job]["counted"]], job) for job in JOBS)
        for r in rows
    ]
    names = list(rows[0]["held_bytes"])
    held = [tuple(f"{r['held_bytes'][n] / 1024:,.0f}" for n in names) for r in rows]
    jobs = ("100 tokens", *JOBS[1:])
    of_token = ("a token", *JOBS[1:])

    def sheet(title: str, columns: Sequence[str], cells: list[tuple[str, ...]]) -> Sheet:
        joined = [a + b for a, b in zip(labels, cells, strict=True)]
        return Sheet(title, (*first, *columns), joined, num_labels=2)

    return [
        sheet("milliseconds of the slowest rank, median (least)", jobs, milliseconds),
        sheet("collectives of a rank, forward + backward", of_token, calls),
        sheet("elements that a rank sends, forward + backward", of_token, sent),
        sheet("KiB of a rank", names, held),
    ]


def _pair(both: Sequence[float], job: str) -> str:
    forward, backward = (f"{x:,.0f}" for x in both)
    return forward if job == "generation" else f"{forward} + {backward}"
