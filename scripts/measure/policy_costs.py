"""Tensor-parallel policies side by side: what each sends, how long it takes, what a rank holds.

A Gemma with the ratios of Gemma-7B, small, on P processes with one thread each, beside one process. First
every policy is shown to give what one process gives (logits, greedy tokens, losses of LoRA and of full steps,
float64), and collectives are counted against their closed form. Then policies take turns: generated tokens,
a LoRA step, a full step, and forward passes of few and many tokens. Fails when anything differs.

On a slow link (Linux, root): unshare --net sh -c 'ip link set lo up && tc qdisc add dev lo root tbf
rate 500mbit burst 256kb latency 100ms && python scripts/measure/policy_costs.py --link "500 Mbit/s"'

Example: python scripts/measure/policy_costs.py --ranks 2 4 --json out.json --plot out.png
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gemma_policies.gemma import ADAPTED, Setting
from gemma_policies.measured import counts, held, results, times
from gemma_policies.pictures import plot
from gemma_policies.projection import count_projections
from gemma_policies.rows_and_sheets import TOLERANCE, failures, row, sheets, spent
from gemma_policies.ways import Way
from rich.console import Console

from seqpar import Group
from seqpar.commands import progress
from seqpar.commands.arguments import parser_of
from seqpar.testing import ProcessWorld

QUICK = Setting(width=24, layers=1, batch=2, length=8, tokens=4, lora_rank=2)


def quietly(group: Group, do: Callable[..., Any], *args: Any) -> Any:
    """Runs it on a rank without the warnings of other packages about one another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return do(group, *args)


def compare(args: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Rows for one process and every policy on every number of ranks."""
    alone = Way("one process")
    more = [Way("Megatron", swap=args.swap)] if args.swap else []
    places = [(1, alone)] + [(size, way) for size in args.ranks for way in Way.all(size) + more]
    worlds = {size: ProcessWorld(size) for size in args.ranks}

    def run(size: int, do: Callable[..., Any], *given: Any) -> list[Any]:
        world = worlds.get(size, worlds[args.ranks[0]])
        return world.run(quietly, do, *given, size=size, timeout=600)

    try:
        want = run(1, results, setting, alone)[0]
        rows = []
        for size, way in progress.track(places, "results"):
            found = [run(size, do, setting, way) for do in (results, counts, held)]
            rows.append(row(way, found[0], want, *found[1:]))
        projections = []
        for size in progress.track(args.ranks, "projections"):
            on_ranks = run(size, count_projections)
            projections += [{"ranks": size, **p} for rank in on_ranks for p in rank]
        rounds: list[list[Any]] = [[] for _ in places]
        for n, (size, way) in progress.track([*enumerate(places)] * args.rounds, "times"):
            rounds[n].append(run(size, times, setting, way, args.sweep))
    finally:
        for world in worlds.values():
            world.close()
    rows = [r | spent(found) for r, found in zip(rows, rounds, strict=True)]
    return {"rows": rows, "projections": projections, "failures": failures(rows, projections)}


def main() -> None:
    """Parses arguments, compares, prints; fails when one of the `failures` is found."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[2, 4], choices=[2, 4])
    add("--width", type=int, default=192, help="of the model, a multiple of 24")
    add("--layers", type=int, default=4)
    add("--batch", type=int, default=4)
    add("--length", type=int, default=128, help="of a sequence that is learned from")
    add("--tokens", type=int, default=25, help="generated in a round")
    add("--lora-rank", type=int, default=8)
    add("--targets", nargs="+", choices=ADAPTED, default=["q_proj", "v_proj"], help="of adapters")
    add("--sweep", type=int, nargs="+", default=[1, 8, 64, 512], help="tokens of forward passes")
    add("--rounds", type=int, default=3)
    add(
        "--swap",
        choices=ADAPTED,
        help="also Megatron with this projection cut along the other axis: fails",
    )
    add("--link", default="loopback", help="what is between the ranks, for the records")
    add("--quick", action="store_true", help="a tiny model, one round; to see that all works")
    add("--json", type=Path, help="write the results here")
    add("--markdown", type=Path, help="write the tables here")
    add("--plot", type=Path, help="draw the times here")
    add("--beside", type=Path, help="results of an earlier run, drawn beside these")
    args = parser.parse_args()
    try:
        chosen = {n: getattr(args, n) for n in Setting.__dataclass_fields__ if n != "targets"}
        setting = QUICK if args.quick else Setting(**chosen, targets=tuple(args.targets))
    except ValueError as error:
        parser.error(str(error))
    if args.quick:
        args.sweep, args.rounds = [1, 8], 1
    if min(*args.sweep, args.rounds) < 1:
        parser.error("sweep and rounds must be positive")

    found = compare(args, setting)
    result = {
        "date": datetime.now(UTC).date().isoformat(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": version("transformers"),
        "peft": version("peft"), "cores": os.cpu_count(), "load": os.getloadavg()[1], "link": args.link,
        "command": " ".join(["policy_costs.py", *sys.argv[1:]]),
        "setting": asdict(setting), "rounds": args.rounds, "tolerance": TOLERANCE, **found,
    }  # fmt: skip
    for sheet in sheets(result["rows"]):
        Console().print(sheet.rich())
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.markdown:
        tables = ("\n".join(sheet.markdown()) for sheet in sheets(result["rows"]))
        args.markdown.write_text("\n\n".join(tables) + "\n")
    if args.plot:
        earlier = [json.loads(args.beside.read_text())] if args.beside else []
        plot([*earlier, result], args.plot)
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
