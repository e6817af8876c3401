"""What it brings that the threads of gloo wait for a CPU: steps with and without, in turn.

A step is forward and backward of causal attention over 8 heads of 64, one thread a rank. In each round
every strategy takes one with threads as gloo makes them (SCHED_OTHER), and one with threads as
`seqpar.Group.of` leaves them (SCHED_BATCH). The ratio is the median of those of rounds. Linux only.

Example: python scripts/measure/gloo_threads.py --ranks 2 --length 64 2048 --json gloo_threads.json
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import torch

from seqpar import Group, Mask, Plan, attention, contiguous, zigzag
from seqpar.comm.gloo_threads import gloo_threads
from seqpar.commands.arguments import DTYPE_BY_NAME, parser_of, positive
from seqpar.commands.contest import quartiles
from seqpar.testing import ProcessWorld, meet

LAYOUTS = {"ring": zigzag, "ulysses": contiguous, "allgather": zigzag}
POLICIES = {"as gloo makes them": os.SCHED_OTHER, "as batch threads": os.SCHED_BATCH}
Times = dict[str, dict[str, list[float]]]


def times(group: Group, length: int, dtype: torch.dtype, rounds: int) -> Times:
    """By strategy and policy, the seconds of each round, until all ranks are done."""
    threads = gloo_threads()
    assert threads, (
        "no thread has the name that gloo gives; what is made for them does nothing here"
    )
    took: Times = {name: {policy: [] for policy in POLICIES} for name in LAYOUTS}
    for n in range(1 + rounds):
        for policy, number in POLICIES.items():
            for thread in threads:
                os.sched_setscheduler(thread, number, os.sched_param(0))
            for name in LAYOUTS:
                seconds = _step(group, name, length, dtype)
                if n > 0:  # the first round warms up
                    took[name][policy].append(seconds)
    return took


def _step(group: Group, strategy: str, length: int, dtype: torch.dtype) -> float:
    layout = LAYOUTS[strategy](length, group.size)
    plan = Plan(group, layout, Mask(causal=True), strategy=strategy)
    shape = 1, layout.rows[group.rank], 8, 64
    q, k, v, dout = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(4))
    meet(group)
    start = time.perf_counter()
    torch.autograd.grad(attention(q, k, v, plan), (q, k, v), dout)
    meet(group)
    return time.perf_counter() - start


def main() -> None:
    """Prints a table, and writes it if asked."""
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4])
    parser.add_argument(
        "--length", type=positive, nargs="+", default=[64, 2048, 8192], help="tokens"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPE_BY_NAME, default=["float32", "bfloat16"]
    )
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    found = []
    for ranks in args.ranks:
        with ProcessWorld(ranks) as world:
            for length in args.length:
                for dtype in args.dtype:
                    took = world.run(
                        times, length, DTYPE_BY_NAME[dtype], args.rounds, timeout=3600.0
                    )[0]
                    for name, by_policy in took.items():
                        row = _row(by_policy)
                        found.append(
                            {
                                "ranks": ranks,
                                "length": length,
                                "dtype": dtype,
                                "strategy": name,
                                **row,
                            }
                        )
                        print(
                            f"  P = {ranks}, N = {length} {dtype} {name}: {_told(row)}", flush=True
                        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def _row(by_policy: dict[str, list[float]]) -> dict[str, object]:
    before, after = by_policy.values()
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    lower, upper = quartiles(ratios)
    medians = {policy: 1e3 * statistics.median(seconds) for policy, seconds in by_policy.items()}
    return {
        "torch": torch.__version__,
        "ms": medians,
        "ratio": (lower, statistics.median(ratios), upper),
    }


def _told(row: dict[str, object]) -> str:
    ms = ", ".join(f"{policy} {x:.1f} ms" for policy, x in row["ms"].items())
    return "{0}; ratio {2:.2f} ({1:.2f}-{3:.2f})".format(ms, *row["ratio"])


if __name__ == "__main__":  # the ranks that it starts import this file too
    main()
