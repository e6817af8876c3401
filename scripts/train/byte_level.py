"""Trains a byte-level language model on sequences that are sharded over any number of ranks.

The text is the source of Python's standard library, or any files. Losses depend on the recipe and
the text, not on how many ranks share a sequence, so a run may be resumed with more or fewer ranks.
Without a launcher there is one rank. On a machine with GPUs every rank needs one of its own, unless
they are hidden with CUDA_VISIBLE_DEVICES= to train on the CPU.

A template to copy for other models: its parts are in scripts/train/byte_lm, one idea each.

Example: torchrun --nproc-per-node 2 scripts/train/byte_level.py --strategy ring --json out.json
Example: torchrun --nproc-per-node 4 scripts/train/byte_level.py --dp 2 --fsdp --autocast bfloat16
             --checkpointing full --loss-tile 1024 --checkpoint runs/a --metrics runs/a.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import traceback
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch.distributed as dist
from byte_lm.loop import train
from byte_lm.recipe import Recipe
from byte_lm.records import MetricsFile, StepRecord
from byte_lm.start import start
from byte_lm.text import load_text, standard_library
from torch import Tensor

import seqpar
from seqpar import Group
from seqpar.commands import progress
from seqpar.commands.arguments import parser_of

MIB = 2**20


def run(args: argparse.Namespace, group: Group, recipe: Recipe, text: Tensor) -> None:
    """Trains, and on rank 0 shows progress and writes the results."""
    records: list[StepRecord] = []
    metrics: MetricsFile | None = None
    with progress.steps("training", recipe.steps, shown=group.rank == 0) as told:

        def on_step(record: StepRecord) -> None:
            nonlocal metrics
            records.append(record)
            if args.metrics and group.rank == 0:
                metrics = metrics or MetricsFile(args.metrics, record.step)
                metrics.write(record)
            told.done(record.text, number=record.step + 1)

        saving = {n: getattr(args, n) for n in ("checkpoint", "save_every", "resume", "fsdp")}
        losses = train(group, recipe, text, **saving, on_step=on_step)
    if metrics:
        metrics.close()
    if group.rank > 0:
        return
    # The first step here is not in the rate: it warms up.
    seconds = sum(record.seconds for record in records[1:])
    rate = recipe.batch * recipe.length * (len(records) - 1) / seconds if seconds else None
    speed = f"{rate:.0f} tokens/s" if rate else "too few steps to time"
    peak = records[-1].peak_bytes if records else None
    memory = f", peak {peak / MIB:.0f} MiB per rank" if peak else ""
    print(
        f"{len(losses)} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}, P={group.size}, {speed}{memory}"
    )
    if args.json:
        result = {"losses": losses, "ranks": group.size, "strategy": recipe.strategy}
        result |= {"layout": recipe.layout, "recipe": asdict(recipe), "tokens_per_second": rate}
        result |= {"grad_norms": [r.grad_norm for r in records], "peak_bytes": peak}
        args.json.write_text(json.dumps(result, indent=1))


def parser() -> argparse.ArgumentParser:
    """The options of the command line: those of a recipe, and where to read and write."""
    options = parser_of(__doc__)
    for f in fields(Recipe):
        options.add_argument(
            f"--{f.name.replace('_', '-')}", type=type(f.default), default=f.default,
            choices=f.metadata["choices"], help=f"{f.metadata['help']} (default: {f.default})",
        )  # fmt: skip
    options.add_argument(
        "--fsdp", action="store_true", help="shard parameters and optimizer over all ranks"
    )
    options.add_argument("--data", type=Path, nargs="+", help="files instead of Python's sources")
    options.add_argument("--max-bytes", type=int, default=2_000_000, help="of text (default: 2 MB)")
    shared = "folder, made if missing, of the newest checkpoint; all ranks must see one file system"
    options.add_argument("--checkpoint", type=Path, help=shared)
    options.add_argument("--save-every", type=int, default=0, help="steps (default: the last only)")
    options.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    options.add_argument("--json", type=Path, help="write losses, recipe and speed here")
    options.add_argument(
        "--metrics", type=Path,
        help="write step, loss, grad_norm, seconds, tokens_per_second and peak_bytes here, a line each",
    )  # fmt: skip
    return options


def main() -> None:
    """Parses arguments and trains; fails when they are wrong or the loss is not finite."""
    args = parser().parse_args()
    # Checkpoints of replicated parameters are written by one rank alone, and that is meant.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
    try:
        recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
        for path in filter(None, (args.json, args.metrics, args.checkpoint)):
            path.parent.mkdir(parents=True, exist_ok=True)
        if args.checkpoint:
            args.checkpoint.mkdir(exist_ok=True)
        text = load_text(args.data or standard_library(), args.max_bytes)
        group, device = start()
        run(args, group, recipe, text.to(device))
    except (
        ValueError, NotImplementedError, OSError, FloatingPointError, seqpar.DesyncError,
    ) as error:  # fmt: skip
        # The frames hold the group; while it lives, gloo's threads do, and may abort Python's exit.
        traceback.clear_frames(error.__traceback__)
        raise SystemExit(f"error: {error}") from error
    finally:
        # Cycles of FSDP hold the process groups, whose threads may abort Python's exit.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
