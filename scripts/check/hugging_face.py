"""Checks, over real processes, that models of transformers on sharded sequences equal one device.

Families x strategy, tiny models in float64: logits, loss and the gradient of every parameter against
the model on one device under its own masks. Prints a table and exits with 1 when anything is off.

Example: torchrun --nproc-per-node 3 scripts/check/hugging_face.py --json transformers.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from seqpar import Group
from seqpar.commands import progress
from seqpar.commands.arguments import parser_of
from seqpar.testing.models.seeing import SEEING, Seeing
from seqpar.testing.models.tiny import SERVED, batch_of
from seqpar.testing.models.training_step import differences, on_rank, one_device

ALL = SERVED | SEEING
STRATEGIES = ("ring", "ulysses", "hybrid", "allgather", "mesh")
ALLOWED = {"logits": 1e-10, "loss": 1e-10, "gradients": 1e-10, "float32": 1e-6}


def check(
    group: Group, names: list[str], strategies: list[str], length: int
) -> list[dict[str, Any]]:
    """One record for each family and strategy: the largest differences of any rank."""
    records = []
    for name in progress.track(names, "families", name=str, shown=group.rank == 0):
        family = ALL[name]
        model, batch = family.make(), batch_of(2, length)
        if isinstance(family, Seeing):
            batch = family.seen(batch)
        want = one_device(model, batch, family.labels)
        for strategy in strategies:
            got = on_rank(group, model, batch, strategy)
            found = differences(got, want, family.float32)
            worst = torch.tensor(list(found.values()), dtype=torch.float64)
            group.all_reduce_(worst, "max")
            record = dict(zip(found, worst.tolist(), strict=True))
            is_right = all(record[n] <= ALLOWED[n] for n in ALLOWED)
            records.append({"family": name, "strategy": strategy, "right": is_right} | record)
    return records


def show(records: list[dict[str, Any]], size: int) -> None:
    """Prints the table."""
    table = Table(title=f"P={size}: largest difference from one device, worst rank")
    for column in ("family", "strategy", *ALLOWED):
        table.add_column(column)
    for r in records:
        cells = (f"{r[name]:.1e}" for name in ALLOWED)
        table.add_row(r["family"], r["strategy"], *cells, style="" if r["right"] else "red")
    Console(width=110).print(table)
    print("float32: parameters whose gradients the model itself adds in float32")


def main() -> None:
    """Parses arguments, checks on all ranks, prints on rank 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--families", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--length", type=int, default=37, help="tokens of a sequence")
    parser.add_argument("--json", type=Path, help="rank 0 writes the records here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    if not dist.is_torchelastic_launched():
        raise SystemExit("start me with: torchrun --nproc-per-node P scripts/check/hugging_face.py")
    dist.init_process_group("gloo")
    group = Group.of()
    records = check(group, args.families, args.strategies, args.length)
    wrong = [r for r in records if not r["right"]]
    if group.rank == 0:
        show(records, group.size)
        print(f"P={group.size}: {len(records)} cases, {len(wrong)} failures")
        if args.json:
            args.json.write_text(json.dumps({"ranks": group.size, "records": records}, indent=1))
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
