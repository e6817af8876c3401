"""Checks, over real processes, that every strategy equals one-device attention, gradients included.

Strategy x layout x mask x dtype x head counts, with lengths that do and do not divide; each compared
with dense float64 attention, and the bytes each rank sent with the formula. Prints a table and exits
with 1 when anything is off, naming the case. Ring and Ulysses, which the others are made of, get every
case, the others a third of them, and keys of another length too.

Example: torchrun --nproc-per-node 3 scripts/check_equivalence.py --json equivalence.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import progress
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from seqpar import Group
from seqpar.layout import LAYOUTS
from seqpar.strategies import STRATEGY_NAMES, Strategy
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
DTYPES = {
    "float64": torch.float64, "float32": torch.float32,
    "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
HEADS = ((4, 4), (6, 2), (3, 1))
LENGTHS = {"float64": (96, 97, 1)}  # else only the length that nothing divides
THOROUGH = ("ring", "ulysses")


def cases(dtypes: list[str], strategies: list[Strategy]) -> Iterator[tuple[str, str, Case]]:
    """(strategy, mask name, case) of the whole product."""
    for strategy in strategies:
        for n, sizes in enumerate(product(LAYOUTS, MASKS, dtypes, HEADS)):
            kind, mask_name, dtype, (hq, hkv) = sizes
            for m, length in enumerate(LENGTHS.get(dtype, (97,))):
                if strategy not in THOROUGH and (n + m) % 3:
                    continue
                packed = (0, length // 3, length // 3, length // 2, length)
                yield strategy, mask_name, Case(
                    length, hq, hkv, d=8, vd=8, batch=1 + length % 2, degree=1,
                    kind=kind, dtype=DTYPES[dtype], **MASKS[mask_name],
                    documents=packed if "documents" in mask_name else None,
                )  # fmt: skip


def check(group: Group, dtypes: list[str], strategies: list[Strategy]) -> list[dict[str, Any]]:
    """Runs all cases; one record per strategy, layout, mask and dtype, with its worst case."""
    everything = list(cases(dtypes, strategies))
    mine: list[Errors] = []
    for strategy, _, case in progress.track(
        everything, f"equivalence, P={group.size}", shown=group.rank == 0
    ):
        mine.append(errors_on_rank(group, case, strategy))
    by_rank: list[Any] = group.transport.gather_objects(mine)
    records: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for (strategy, mask, case), *errors in zip(everything, *by_rank, strict=True):
        key = strategy, case.kind, mask, str(case.dtype).removeprefix("torch.")
        record = records.setdefault(
            key, {"cases": 0, "failures": [], "worst": dict.fromkeys(NAMES, 0.0)}
        )
        record["cases"] += 1
        for rank, e in enumerate(errors):
            record["failures"] += [f"{case}, rank {rank}: {text}" for text in e.failures]
            for name in NAMES:
                share = e.found[name] / e.allowed[name] if e.allowed[name] else e.found[name]
                record["worst"][name] = max(record["worst"][name], share)
    names = "strategy", "layout", "mask", "dtype"
    return [dict(zip(names, key, strict=True)) | record for key, record in records.items()]


def show(records: list[dict[str, Any]], size: int, console: Console) -> None:
    """Prints the table, then every failure."""
    table = Table(
        title=f"P={size}: largest error as a share of what is allowed, worst rank and case"
    )
    for column in ("strategy", "layout", "mask", "dtype"):
        table.add_column(column)
    for column in (*NAMES, "cases", "failed"):
        table.add_column(column, justify="right")
    for r in records:
        style = "red" if r["failures"] else ""
        shares = (f"{r['worst'][n]:.2g}" for n in NAMES)
        table.add_row(
            r["strategy"], r["layout"], r["mask"], r["dtype"], *shares, str(r["cases"]),
            str(len(r["failures"])), style=style,
        )  # fmt: skip
    console.print(table)
    for r in records:
        for failure in r["failures"]:
            print(f"FAILED {r['strategy']}, {r['mask']}: {failure}")


def main() -> None:
    """Parses arguments, checks on all ranks, prints on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--strategy", nargs="+", choices=STRATEGY_NAMES, default=list(STRATEGY_NAMES)
    )
    parser.add_argument("--json", type=Path, help="rank 0 writes the records here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if not dist.is_torchelastic_launched():
        raise SystemExit("start me with: torchrun --nproc-per-node P scripts/check_equivalence.py")
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    records = check(Group.of(), args.dtype, args.strategy)
    failed = [r for r in records if r["failures"]]
    if rank == 0:
        show(records, size, Console(width=120))
        total = sum(r["cases"] for r in records)
        print(f"P={size}: {total} cases, {sum(len(r['failures']) for r in failed)} failures")
        if args.json:
            args.json.write_text(json.dumps({"ranks": size, "records": records}, indent=1))
    dist.destroy_process_group()
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
