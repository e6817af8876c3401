"""Ways to bring q, k and v of rows to their heads: three messages a rank, one, or a collective.

Every rank of P has rows of 8 heads of 64, and each way is taken in turn, from the same moment on, with the
copies that it needs. The slowest rank counts. Each result is compared before anything is timed.

Example: python scripts/measure/exchange_ways.py --ranks 2 4 --rows 32 512 --json exchange_ways.json
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import Group, contiguous
from seqpar.comm import AllToAll, rows_to_heads, together
from seqpar.commands.arguments import parser_of, positive
from seqpar.layout import split_heads
from seqpar.testing import ProcessWorld

HEADS, WIDTH, WARM_UP = 8, 64, 5
WAYS = "three messages", "one message", "all_to_all_single"


def by_messages(xs: list[Tensor], exchange: AllToAll, small: int) -> tuple[Tensor, ...]:
    """Tensors for one rank are one message up to so many bytes."""
    with patch.object(together, "SMALL", small):
        return rows_to_heads(xs, exchange)


def by_collective(xs: list[Tensor], size: int) -> tuple[Tensor, ...]:
    """All in one buffer, by one collective."""
    _, rows, heads, width = xs[0].shape
    sent = xs[0].new_empty(size, len(xs), rows, heads // size, width)
    for n, x in enumerate(xs):
        sent[:, n] = x[0].unflatten(1, (size, -1)).transpose(0, 1)
    came = torch.empty_like(sent)
    dist.all_to_all_single(came, sent)
    # Rows of each rank follow on one another, as in a contiguous layout.
    return tuple(came[:, n].flatten(0, 1)[None] for n in range(len(xs)))


def times(group: Group, rows: int, rounds: int) -> list[list[float]]:
    """By way, milliseconds of each round on this rank."""
    size, layout = group.size, contiguous(rows * group.size, group.size)
    split, places = split_heads(HEADS, HEADS, size), tuple(layout.places(r) for r in range(size))
    exchange = AllToAll(group, (places,) * 3, (split.q,) * 3, (HEADS,) * 3, (None,) * 3)
    xs = [torch.randn(1, rows, HEADS, WIDTH) for _ in range(3)]
    ways = (
        lambda: by_messages(xs, exchange, 0),
        lambda: by_messages(xs, exchange, 1 << 40),
        lambda: by_collective(xs, size),
    )
    results = [way() for way in ways]
    assert all(torch.equal(x, y) for ys in results for x, y in zip(results[0], ys, strict=True))
    took: list[list[float]] = [[] for _ in ways]
    for _ in range(WARM_UP + rounds):
        for way, seconds in zip(ways, took, strict=True):
            dist.barrier()
            start = time.perf_counter()
            way()
            seconds.append(1e3 * (time.perf_counter() - start))
    return [seconds[WARM_UP:] for seconds in took]


def main() -> None:
    """Prints a table, and writes it if asked."""
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=positive, nargs="+", default=[16, 64, 256, 1024, 4096])
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    if any(HEADS % size for size in args.ranks):
        parser.error(f"the ranks must divide {HEADS} heads: a collective wants even parts")
    found = []
    print(f"q, k, v float32, ms (quartiles): {', '.join(WAYS)}")
    for size in args.ranks:
        with ProcessWorld(size) as world:
            for rows in args.rows:
                by_rank = world.run(times, rows, args.rounds)
                slowest = [
                    [max(all_) for all_ in zip(*w, strict=True)] for w in zip(*by_rank, strict=True)
                ]
                row = {
                    "ranks": size, "rows": rows, "torch": torch.__version__,
                    "bytes for a rank": 3 * rows * HEADS // size * WIDTH * 4,
                    **{name: statistics.quantiles(ms, n=4) for name, ms in zip(WAYS, slowest, strict=True)},
                }  # fmt: skip
                found.append(row)
                told = "   ".join("{1:.2f} ({0:.2f}-{2:.2f})".format(*row[name]) for name in WAYS)
                print(
                    f"  P = {size}, {row['bytes for a rank'] / 1024:7.0f} KiB a rank: {told}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":  # the ranks that it starts import this file too
    main()
