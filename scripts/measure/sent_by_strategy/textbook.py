"""The volume of every strategy in its textbook form, which skips no hop and never lets queries travel."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from sent_by_strategy.routes import Way
from seqpar.calls import Shape
from seqpar_kernels import accumulation_dtype


def textbook(way: Way, ranks: int, length: int, shape: Shape) -> tuple[float, float] | None:
    """Bytes per rank forward and backward in the textbook form, for a full mask and even shards.

    `None` for the hybrid, which has two, and where additions are in order, which the textbook knows not.
    """
    n_q, n_k, d, f = shape.hq, shape.hkv, shape.d, Fraction(ranks - 1, ranks)
    hq, hk = n_q * d, n_k * d
    exchange = f / ranks * length
    exchanged = exchange * (2 * hq + 2 * max(n_k, ranks) * d)
    kv, scores = 2 * f * length * hk, 2 * f * n_q * length**2
    # (narrow forward, wide forward, narrow backward, wide backward), elements
    table: dict[str, tuple[Any, Any, Any, Any]] = {
        "ring": (kv, 0, kv, 2 * length * hk),
        "ulysses": (exchanged, 0, exchanged, 0),
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
    narrow, wide = (
        shape.batch * dtype.itemsize for dtype in (shape.dtype, accumulation_dtype(shape.dtype))
    )
    return float(narrow * a + wide * b), float(narrow * c + wide * e)
