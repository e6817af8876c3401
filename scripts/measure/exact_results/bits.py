"""Which bits of the results depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from exact_results.gathered import STRATEGIES, run
from seqpar.commands import progress
from seqpar.testing import Case
from seqpar_kernels import Implementation

TERMS: dict[str, Any] = {"softcap": 5.0, "alibi": True, "sinks": True, "dropout": 0.3}
BORDER = 64  # of the reference's tiles


@dataclass(frozen=True)
class Claim:
    """A strategy whose bits are compared with its own at P = 1.

    Args:
        implementation: `None` is what is chosen on CPU for Ulysses: aten.
        promised: whether they must be the same.
    """

    strategy: str
    case: Case
    implementation: Implementation | None
    promised: bool


def claims(length: int) -> list[Claim]:
    """What is promised to be the same bits for any P, and for contrast some that is not."""
    base = Case(length, 6, 2, d=16, vd=16, dtype=torch.float32, invariant=True, **TERMS)
    plain = Case(length, 6, 2, d=16, vd=16, dtype=torch.float32)
    cut = replace(base, hq=4, multiple_of=BORDER)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("contiguous", "zigzag", "striped"):
            case = replace(base, kind=kind, dtype=dtype)
            found.append(Claim("ulysses", case, "reference", promised=True))
        found.append(Claim("ulysses", replace(plain, dtype=dtype), None, promised=True))
        found.append(Claim("ring", replace(cut, dtype=dtype), "reference", promised=True))
        for kind in ("contiguous", "zigzag", "striped"):
            case = replace(cut, kind=kind, dtype=dtype)
            found.append(Claim("allgather", case, "reference", promised=True))
        loose = replace(base, invariant=None, dtype=dtype)
        for strategy, kind in STRATEGIES.items():
            if strategy != "ulysses":
                case = replace(loose, kind=kind)
                found.append(Claim(strategy, case, "reference", promised=False))
    return found


def measure_bits(length: int, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """One record per claim: for each P how many elements of each result differ, and by how much."""
    records = []
    for claim in progress.track(claims(length), "bits"):
        one = run(1, claim.case, claim.strategy, claim.implementation)
        differences = {}
        for size in ranks:
            many = run(size, claim.case, claim.strategy, claim.implementation)
            differences[str(size)] = {
                name: difference(x, y)
                for name, x, y in zip(claim.case.names, one, many, strict=True)
            }
        records.append(
            {
                "strategy": claim.strategy, "layout": claim.case.kind,
                "multiple_of": claim.case.multiple_of,
                "implementation": claim.implementation or "aten",
                "dtype": str(claim.case.dtype).removeprefix("torch."),
                "promised": claim.promised, "differences": differences,
            }
        )  # fmt: skip
    return records


def difference(x: Tensor, y: Tensor) -> dict[str, float]:
    """Whether y is x, how many elements differ, and the largest difference in steps of the largest value."""
    off = float((x.double() - y.double()).abs().max())
    step = torch.finfo(x.dtype).eps * float(x.abs().max())
    return {
        "equal": torch.equal(x, y),
        "elements": x.numel(),
        "differ": int((x != y).sum()),
        "steps": float(f"{off / step:.4g}") if step else 0.0,
    }
