"""One rank of the demo: equality, bytes, memory, time and training, each strategy. See demo.py."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "train"))  # where the model that is trained lies

from byte_lm.loop import train
from byte_lm.model import ByteLM
from byte_lm.ranks import Ranks
from byte_lm.recipe import Recipe
from byte_lm.text import batch_at, load_text, standard_library

import seqpar
from seqpar import Group, Layout, Mask, Plan
from seqpar.data import IGNORE
from seqpar.layout import LAYOUTS
from seqpar.testing import NAMES, Budget, PeakMemory, Step, run_step
from seqpar.testing.budget import max_error
from seqpar.testing.memory import give_back_freed
from seqpar.testing.oracle import Terms, visible

HEADS, KV_HEADS, WIDTH = 8, 4, 64
LAYOUT_OF = {"ring": "zigzag", "ulysses": "contiguous"}
ONE_DEVICE = "one device"
SMALLEST_GIVEN_BACK_BYTES = 64 * 2**10  # while memory is measured
GLIBC_LIMIT_BYTES = 32 * 2**20  # which glibc raises its threshold to by itself, at most


def read_text(
    text: Tensor, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout `[1 sl h d]` at some positions: of each byte and of the one before it.

    Every pair of bytes has its own random vector, so that equal text looks alike.
    """
    here, before = text[positions].long(), text[positions - 1].long()
    tensors = []
    for seed, num_heads in enumerate((HEADS, KV_HEADS, KV_HEADS, HEADS)):
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(2, 256, num_heads * WIDTH, generator=generator) / 2**0.5
        x = table[0, here].add_(table[1, before])
        tensors.append(x.view(1, len(positions), num_heads, WIDTH).to(dtype))
    q, k, v, dout = tensors
    return q, k, v, dout


def equality(group: Group, strategy: str, text: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Largest errors over all ranks against dense float64 attention, and what is allowed."""
    layout = LAYOUTS[LAYOUT_OF[strategy]](len(text), group.size)
    mine = layout.positions(group.rank)
    q, k, v, dout = read_text(text, torch.arange(len(text)), dtype)
    plan = Plan(group, layout, Mask(causal=True), strategy=strategy)
    step = run_step(q[:, mine], k[:, mine], v[:, mine], dout[:, mine], plan)
    budget = Budget.of(q, k, v, dout, visible(len(text), True, None), Terms(WIDTH**-0.5))
    errors = [
        max_error(x, expected[:, mine])
        for x, expected in zip(step.results, budget.expected, strict=True)
    ]
    everyone: list[Any] = group.transport.gather_objects(errors)
    found = [max(column) for column in zip(*everyone, strict=True)]
    return {
        "length": len(text),
        "errors": dict(zip(NAMES, found, strict=True)),
        "allowed": dict(zip(NAMES, budget.allowed, strict=True)),
    }


def text_step(group: Group, strategy: str, text: Tensor) -> Step:
    """One forward and backward over the text, in float32."""
    layout = LAYOUTS[LAYOUT_OF[strategy]](len(text), group.size)
    plan = Plan(group, layout, Mask(causal=True), strategy=strategy)
    return run_step(*read_text(text, layout.positions(group.rank), torch.float32), plan)


def one_device_step(text: Tensor) -> float:
    """Seconds of one forward and backward of torch's own attention on everything."""
    whole = read_text(text, torch.arange(len(text)), torch.float32)
    *leaves, dout = (x.transpose(1, 2) for x in whole)
    leaves = [x.requires_grad_() for x in leaves]
    start = time.perf_counter()
    out = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    torch.autograd.grad(out, leaves, dout)
    return time.perf_counter() - start


class OneDevice(nn.Module):
    """torch's own causal attention, called as the modules of this package are."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:  # noqa: ARG002
        """`[b s hq d]` of the whole sequence."""
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)


def training_step(group: Group, subject: str, text: Tensor, length: int) -> dict[str, Any]:
    """Loss, gradient norm and peak growth of memory of one step on a sequence."""
    recipe = Recipe(length=length, batch=1)
    if subject != ONE_DEVICE:
        recipe = replace(recipe, strategy=subject, layout=LAYOUT_OF[subject])
    ranks = Ranks.of(group, recipe)
    model = ByteLM(recipe, OneDevice if subject == ONE_DEVICE else lambda: ranks.attention(recipe))
    with PeakMemory() as peak:
        batch, layout = seqpar.shard_batch(batch_at(text, recipe, 0), group, recipe.layout)
        losses = model(batch["input_ids"], batch["labels"], batch["position_ids"], layout)
        loss = seqpar.mean_loss(losses, group, valid=batch["labels"] != IGNORE)
        seqpar.backward(loss, model, group)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return {"peak_bytes": peak.bytes, "loss": loss.item(), "gradient_norm": norm.item()}


def memory(group: Group, subject: str, text: Tensor, length: int) -> dict[str, Any]:
    """What a rank holds at its peak, the busiest counts: in attention alone, and in a training step."""
    attend = one_device_step if subject == ONE_DEVICE else partial(text_step, group, subject)
    attend(text[: 8 * group.size])  # threads, buffers of the transport
    with PeakMemory() as peak:
        attend(text[:length])
    training_step(group, subject, text, 8 * group.size)
    step = training_step(group, subject, text, length)
    everyone: list[Any] = group.transport.gather_objects((peak.bytes, step["peak_bytes"]))
    alone, whole = (max(peaks) for peaks in zip(*everyone, strict=True))
    return {"peak_bytes": alone, "step": step | {"peak_bytes": whole}}


def measure(group: Group, strategy: str, args: argparse.Namespace, text: Tensor) -> dict[str, Any]:
    """The record of one strategy. All ranks must call."""
    long, short = text[: args.long], text[: args.short]
    steps = [text_step(group, strategy, long) for _ in range(args.rounds)]
    seconds = statistics.median(step.seconds for step in steps)
    volumes = steps[-1].sent, steps[-1].derived
    mine = (seconds, *(each.forward.bytes + each.backward.bytes for each in volumes))
    everyone: list[Any] = group.transport.gather_objects(mine)
    recipe = Recipe(strategy=strategy, layout=LAYOUT_OF[strategy], steps=args.steps)
    return {
        "strategy": strategy,
        "layout": LAYOUT_OF[strategy],
        "ranks": group.size,
        "seconds": max(e[0] for e in everyone),
        "sent_bytes": [e[1] for e in everyone],
        "derived_bytes": [e[2] for e in everyone],
        "equality": {
            name: equality(group, strategy, short, getattr(torch, name))
            for name in ("float64", "float32", "bfloat16")
        },
        "losses": train(group, recipe, text),
    }


def main() -> None:
    """Measures under torchrun; rank 0 writes the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", type=int, default=8192, help="tokens to time and hold")
    parser.add_argument("--short", type=int, default=500, help="tokens to compare with float64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="of training")
    parser.add_argument("--text", type=Path, help="a file instead of Python's sources")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = load_text([args.text] if args.text else standard_library(), 2_000_000)
    dist.init_process_group("gloo")
    group = Group.of()
    subjects = [ONE_DEVICE] * (group.size == 1) + list(LAYOUT_OF)
    # Memory first, while little has been allocated; giving it back would slow down what is timed.
    give_back_freed(SMALLEST_GIVEN_BACK_BYTES)
    record = {subject: memory(group, subject, text, args.long) for subject in subjects}
    give_back_freed(GLIBC_LIMIT_BYTES)
    for strategy in LAYOUT_OF:
        record[strategy] |= measure(group, strategy, args, text)
    if group.size == 1:
        rounds = [one_device_step(text[: args.long]) for _ in range(args.rounds)]
        record[ONE_DEVICE]["seconds"] = statistics.median(rounds)
    if group.rank == 0:
        args.json.write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
