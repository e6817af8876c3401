"""Checks, over real processes, that models of transformers sharded over sp x tp equal one device.

Every family with its attention replaced, MLPs, embedding and head under the Megatron policy: logits, loss
and the gradient of every parameter against the model on one device, in float64. Steps that models take in
float32 or bfloat16 are taken out of them, so that they can judge. Exits with 1 when anything is off.

Example: torchrun --nproc-per-node 4 scripts/check/tensor_parallel_models.py --tp 2 --json tp.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from transformers.utils import logging

from seqpar import Group
from seqpar.commands import progress
from seqpar.commands.arguments import parser_of
from seqpar.testing.models.fused import FUSED, exactly
from seqpar.testing.models.sharded import sharded_step
from seqpar.testing.models.tiny import batch_of
from seqpar.testing.models.training_step import differences, one_device

ALLOWED = {"logits": 1e-10, "loss": 1e-10, "gradients": 1e-10}


def check(tp: int, names: list[str], strategy: str, length: int) -> list[dict[str, Any]]:
    """One record for each family: the largest differences of any rank."""
    group, records = Group.of(), []
    mesh = init_device_mesh("cpu", (group.size // tp, tp), mesh_dim_names=("sp", "tp"))
    with exactly():
        for name in progress.track(names, "families", name=str, shown=group.rank == 0):
            family = FUSED[name]
            model, batch = family.make(), batch_of(2, length)
            want = one_device(model, batch, family.labels, "eager")
            found = differences(sharded_step(mesh, model, batch, strategy), want)
            worst = torch.tensor([found[n] for n in ALLOWED], dtype=torch.float64)
            group.all_reduce_(worst, "max")
            record = dict(zip(ALLOWED, worst.tolist(), strict=True))
            is_right = all(record[n] <= ALLOWED[n] for n in ALLOWED)
            records.append({"family": name, "right": is_right} | record)
    return records


def show(records: list[dict[str, Any]], what: str) -> None:
    """Prints the table."""
    table = Table(title=f"{what}: largest difference from one device, worst rank")
    for column in ("family", *ALLOWED):
        table.add_column(column)
    for r in records:
        cells = (f"{r[name]:.1e}" for name in ALLOWED)
        table.add_row(r["family"], *cells, style="" if r["right"] else "red")
    Console(width=110).print(table)


def main() -> None:
    """Parses arguments, checks on all ranks, prints on rank 0."""
    parser = parser_of(__doc__)
    parser.add_argument("--tp", type=int, default=2, help="ranks that share the weights")
    parser.add_argument("--families", nargs="+", choices=FUSED, default=list(FUSED))
    parser.add_argument("--strategy", choices=("ring", "ulysses", "allgather"), default="ring")
    parser.add_argument("--length", type=int, default=23, help="tokens of a sequence")
    parser.add_argument("--json", type=Path, help="rank 0 writes the records here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    logging.set_verbosity_error()  # DBRX's parts of a config are no models, of which it warns
    if not dist.is_torchelastic_launched():
        raise SystemExit(
            f"start me with: torchrun --nproc-per-node P scripts/check/{Path(__file__).name}"
        )
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if size % args.tp:
        raise SystemExit(f"{size} ranks must divide by tp={args.tp}")
    records = check(args.tp, args.families, args.strategy, args.length)
    wrong = [r for r in records if not r["right"]]
    if rank == 0:
        what = f"sp {size // args.tp} x tp {args.tp}, {args.strategy}"
        show(records, what)
        print(f"{what}: {len(records)} families, {len(wrong)} failures")
        if args.json:
            args.json.write_text(
                json.dumps({"ranks": size, "tp": args.tp, "records": records}, indent=1)
            )
    dist.destroy_process_group()
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
