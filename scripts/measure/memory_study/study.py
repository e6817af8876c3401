"""The study: every subject at every length, what fits, and what is not as it should be."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from memory_study.polynomial import Fit, fit, longest
from memory_study.subjects import (
    MIB,
    NOT_STORED,
    STORED,
    STRATEGIES,
    Setting,
    measure,
    stored_bytes,
)
from seqpar.commands import progress

STORED_LIMIT_BYTES = 4 * 2**30  # lengths for which stored scores would need more are left out
VERIFY_FACTOR = 4  # `--verify` goes no further than this times the longest measured length
VERIFY_TOLERANCE = 0.15  # lines were 4 to 8 % too high at 32768, fitted up to 8192


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
