"""How far results in 16 bits are from float64 attention on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from exact_results.gathered import STRATEGIES, Results, run
from exact_results.rings16 import ROUNDING, rounding_ring
from seqpar.commands import progress
from seqpar.testing import NAMES, Case, oracle
from seqpar_kernels import Implementation

METRICS = ("typical", "largest")


def errors(got: Results, exact: Results) -> dict[str, dict[str, float]]:
    """How far results are off: by metric and name.

    `largest` is the largest error of an element over the largest value. `typical` is the root of the
    mean square, over positions and heads, of |error| / |value| of a row: the few long rows that see few
    keys count as much as the others. Rows that must be zero are left out: dq where one key is seen.
    """
    found: dict[str, dict[str, float]] = {metric: {} for metric in METRICS}
    for name, x, e in zip(NAMES, got, exact, strict=True):
        off = x.double() - e
        found["largest"][name] = float(off.abs().max() / e.abs().max())
        length = e.norm(dim=-1)
        rows = length > 1e-9 * length.max()
        found["typical"][name] = float(
            (off.norm(dim=-1)[rows] / length[rows]).square().mean().sqrt()
        )
    return {
        metric: {name: float(f"{x:.4g}") for name, x in by_name.items()}
        for metric, by_name in found.items()
    }


def measure_errors(case: Case, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """One record per strategy (or emulated ring), implementation and P."""
    seen = oracle.visible(case.length, case.causal, None)
    q, k, v, dout = (x.double() for x in case.tensors())
    exact = oracle.with_gradients(q, k, v, dout, seen, case.terms())
    implementations: tuple[Implementation, ...] = ("aten", "reference")
    subjects: list[tuple[str, Implementation | None]] = [
        (name, how)
        for name in (*STRATEGIES, *ROUNDING)
        for how in ((None,) if name.startswith("materialised") else implementations)
    ]
    records = []
    everything = [(*subject, size) for subject in subjects for size in ranks]
    for name, how, size in progress.track(everything, "errors"):
        if name in ROUNDING:
            kind = "zigzag"
            layout = replace(case, kind=kind).layout(size)
            got = rounding_ring(case, layout, how or "reference", ROUNDING[name])
        else:
            kind = STRATEGIES[name]
            got = run(size, replace(case, kind=kind), name, how)
        records.append(
            {
                "name": name, "ours": name not in ROUNDING, "layout": kind,
                "implementation": how or "torch", "ranks": size, **errors(got, exact),
            }
        )  # fmt: skip
    return records
