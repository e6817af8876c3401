"""The cases that `seqpar check` compares with dense float64 attention, and what comes of each.

Strategy x layout x mask x dtype x head counts, with lengths that do and do not divide. Ring and Ulysses,
which the others are made of, get every case, the others a third of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

from seqpar import Group
from seqpar.commands.arguments import DTYPE_BY_NAME
from seqpar.layout import LAYOUTS
from seqpar.testing import NAMES, Case, Errors, errors_on_rank

MASKS: dict[str, dict[str, Any]] = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 9},
    "two-sided window": {"causal": False, "window": 9},
    "causal, documents": {"causal": True},
    "keys of another length": {"causal": False, "kv_length": 61},
    "causal, every score term": {
        "causal": True,
        "softcap": 5.0,
        "alibi": True,
        "sinks": True,
        "dropout": 0.3,
    },
}
HEADS = ((4, 4), (6, 2), (3, 1))
LENGTHS = {"float64": (96, 97, 1)}  # else only the length that nothing divides
THOROUGH = ("ring", "ulysses")

Key = tuple[str, str, str, str]  # strategy, layout, mask, dtype
Run = Callable[[Callable[..., list[Errors]], str, list[Case]], list[list[Errors]]]


@dataclass(frozen=True)
class Record:
    """What became of the cases of one strategy, layout, mask and dtype.

    `worst` is by result the largest error of all cases and ranks, as a share of what is allowed.
    """

    strategy: str
    layout: str
    mask: str
    dtype: str
    cases: int
    failures: list[str]
    worst: dict[str, float]


def compare(run: Run, dtypes: Sequence[str], strategies: Sequence[str]) -> Iterator[Record]:
    """Runs all cases; one record after the other.

    Args:
        run: calls a function on every rank with a group and what else it is given; results by rank.
    """
    pairs = (pair for strategy in strategies for pair in _cases(strategy, dtypes))
    for key, same in groupby(pairs, key=lambda pair: pair[0]):
        cases = [case for _, case in same]
        yield _record(key, cases, run(errors_of, key[0], cases))


def errors_of(group: Group, strategy: str, cases: list[Case]) -> list[Errors]:
    """The errors of each case on this rank. All ranks must call."""
    return [errors_on_rank(group, case, strategy) for case in cases]


def _cases(strategy: str, dtypes: Sequence[str]) -> Iterator[tuple[Key, Case]]:
    for n, sizes in enumerate(product(LAYOUTS, MASKS, dtypes, HEADS)):
        kind, mask_name, dtype, (hq, hkv) = sizes
        for m, length in enumerate(LENGTHS.get(dtype, (97,))):
            # Each third another one, so that every head count and length meets every mask.
            if strategy not in THOROUGH and (n + n // len(HEADS) + m) % 3:
                continue
            packed = (0, length // 3, length // 3, length // 2, length)
            yield (strategy, kind, mask_name, dtype), Case(
                length, hq, hkv, d=8, vd=8, batch=1 + length % 2, degree=1,
                kind=kind, dtype=DTYPE_BY_NAME[dtype], **MASKS[mask_name],
                documents=packed if "documents" in mask_name else None,
            )  # fmt: skip


def _record(key: Key, cases: list[Case], by_rank: list[list[Errors]]) -> Record:
    failures: list[str] = []
    worst = dict.fromkeys(NAMES, 0.0)
    for rank, errors in enumerate(by_rank):
        for case, e in zip(cases, errors, strict=True):
            failures += [f"{case}, rank {rank}: {text}" for text in e.failures]
            for name in NAMES:
                share = e.found[name] / e.allowed[name] if e.allowed[name] else e.found[name]
                worst[name] = max(worst[name], share)
    return Record(*key, len(cases), failures, worst)
