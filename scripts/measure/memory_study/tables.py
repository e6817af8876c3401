"""What a study found, in tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from memory_study.subjects import MIB


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
