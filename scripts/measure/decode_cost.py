"""Decoding over a sharded cache: bytes and milliseconds per token of one layer, by ranks and length.

P processes with one thread each take turns with one process that runs torch's own attention of one query
over a cache of its own. A token is appended and attended, `KVCache.step`, and the slowest rank counts:
median of all tokens, and the fastest token, which says more on a machine that does other things. Bytes
are those of the busiest rank. Fails when they are not those of the formula, or depend on the length.

Example: python scripts/measure/decode_cost.py --lengths 8192 65536 --ranks 1 2 4 --json out.json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from seqpar import Group, KVCache, zigzag
from seqpar.calls import Shape
from seqpar.commands import progress
from seqpar.commands.arguments import parser_of
from seqpar.decode import decode_volume
from seqpar.testing import ProcessWorld

WARMUP = 4  # tokens


def tensors(num: int, setting: dict[str, Any]) -> list[torch.Tensor]:
    """q, k, v of so many positions."""
    (hq, hkv), d, batch = setting["heads"], setting["d"], setting["batch"]
    return [torch.randn(batch, num, h, d, dtype=setting["dtype"]) for h in (hq, hkv, hkv)]


@torch.no_grad()
def rank_tokens(group: Group, setting: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of every token on this rank, what one token sends, and what the formula says."""
    layout = zigzag(setting["length"], group.size)
    _, k, v = tensors(layout.rows[group.rank], setting)
    cache = KVCache(group, layout, k, v)
    torch.manual_seed(0)  # new tokens are the same on every rank
    times = []
    for _ in range(WARMUP + setting["tokens"]):
        new = tensors(1, setting)
        group.traffic.reset()
        start = time.perf_counter()
        cache.step(*new)
        times.append(1e3 * (time.perf_counter() - start))
    formula = decode_volume(1, group.rank, group.size, Shape.of(*new))
    counted = {"counted": group.traffic.total.bytes, "agreement": group.traffic.agreement.bytes}
    return {"ms": times[WARMUP:], "formula": formula.bytes, **counted}


@torch.no_grad()
def one_device_tokens(_: Group, setting: dict[str, Any]) -> list[float]:
    """Milliseconds of every token with torch's attention, whose cache has room for it."""
    _, k, v = (x.transpose(1, 2).contiguous() for x in tensors(setting["length"] + 1, setting))
    times = []
    for _ in range(WARMUP + setting["tokens"]):
        q, *new = (x.transpose(1, 2) for x in tensors(1, setting))
        start = time.perf_counter()
        for cache, x in zip((k, v), new, strict=True):
            cache[:, :, -1:] = x
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        times.append(1e3 * (time.perf_counter() - start))
    return times[WARMUP:]


def measure(setting: dict[str, Any], ranks: list[int], rounds: int) -> list[Any]:
    """A row for one device and for each number of ranks, the rounds of all in turns."""
    worlds = {size: ProcessWorld(size) for size in (1, *ranks)}
    one: list[float] = []
    found: dict[int, list[list[dict[str, Any]]]] = {size: [] for size in ranks}
    try:
        for size in progress.track([None, *ranks] * rounds, f"decoding, N={setting['length']}"):
            if size is None:
                one += worlds[1].run(one_device_tokens, setting, timeout=600)[0]
            else:
                found[size].append(worlds[size].run(rank_tokens, setting, timeout=600))
    finally:
        for world in worlds.values():
            world.close()
    nothing = {"bytes": 0, "formula": 0, "agreement": 0}
    rows = [{"ranks": None, "ms": statistics.median(one), "least_ms": min(one), **nothing}]
    for size, runs in found.items():
        slowest = [
            max(token) for run in runs for token in zip(*(r["ms"] for r in run), strict=True)
        ]
        busiest = max(runs[0], key=lambda r: r["counted"])
        is_formula = all(r["counted"] == r["formula"] for run in runs for r in run)
        rows.append(
            {
                "ranks": size, "ms": statistics.median(slowest),
                "least_ms": min(slowest), "bytes": busiest["counted"],
                "formula": busiest["formula"], "agreement": busiest["agreement"],
                "counted_is_formula": is_formula,
            }
        )  # fmt: skip
    return [{"length": setting["length"], **row} for row in rows]


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What must not be, in words."""
    wrong = []
    for row in rows:
        if not row.get("counted_is_formula", True):
            wrong.append(
                f"P={row['ranks']}, N={row['length']}: counted bytes differ from the formula"
            )
    for size in {row["ranks"] for row in rows}:
        sent = {row["bytes"] for row in rows if row["ranks"] == size}
        if len(sent) > 1:
            wrong.append(f"P={size}: the bytes of a token depend on the length, {sorted(sent)}")
    return wrong


def main() -> None:
    """Parses arguments, measures, prints; fails when one of the `failures` is found."""
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--heads", type=int, nargs=2, default=[16, 4], metavar=("QUERY", "KV"))
    parser.add_argument("--d", type=int, default=64, help="width of a head")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=32, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    sizes = (*args.lengths, *args.ranks, *args.heads, args.d, args.batch, args.tokens, args.rounds)
    if min(sizes) < 1 or args.heads[0] % args.heads[1]:
        parser.error("all numbers must be positive, and query heads a multiple of kv heads")
    setting = {name: getattr(args, name) for name in ("heads", "d", "batch", "tokens")}
    setting["dtype"] = getattr(torch, args.dtype)
    rows = []
    for length in args.lengths:
        rows += measure(setting | {"length": length}, args.ranks, args.rounds)
    table = Table(
        "N",
        "P",
        "ms per token",
        "fastest",
        "bytes",
        "of agreement",
        title=f"one layer, {args.dtype}",
    )
    for row in rows:
        size = "one device" if row["ranks"] is None else str(row["ranks"])
        cells = (
            f"{row['ms']:.2f}",
            f"{row['least_ms']:.2f}",
            f"{row['bytes']:,}",
            str(row["agreement"]),
        )
        table.add_row(str(row["length"]), size, *cells)
    Console().print(table)
    result = {
        "date": datetime.now(UTC).date().isoformat(), "python": platform.python_version(),
        "torch": torch.__version__, "cores": os.cpu_count(),
        "command": " ".join(["decode_cost.py", *sys.argv[1:]]),
        "setting": setting | {"dtype": args.dtype}, "rows": rows, "failures": failures(rows),
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
