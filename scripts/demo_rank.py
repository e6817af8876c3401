"""One rank of the demo: equality, bytes, memory, time and training, each strategy. See demo.py."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from train_bytes import Recipe, load_text, standard_library, train

from seqpar import Group, Mask, Plan
from seqpar.layout import LAYOUTS
from seqpar.testing import NAMES, Budget, PeakMemory, Step, run_step
from seqpar.testing.budget import max_error
from seqpar.testing.oracle import Terms, visible

HEADS, KV_HEADS, WIDTH = 8, 4, 64
LAYOUT_OF = {"ring": "zigzag", "ulysses": "contiguous"}


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


def one_device(text: Tensor, rounds: int) -> dict[str, Any]:
    """The record of torch's own attention on the whole text, with one thread as every rank has."""
    one_device_step(text[:64])
    with PeakMemory() as peak:
        one_device_step(text)
    seconds = statistics.median(one_device_step(text) for _ in range(rounds))
    return {"peak_bytes": peak.bytes, "seconds": seconds}


def peak_bytes(group: Group, strategy: str, text: Tensor) -> int:
    """Peak growth of this rank's memory over one step, its own tensors included."""
    text_step(group, strategy, text[: 8 * group.size])  # threads, buffers of the transport
    with PeakMemory() as peak:
        text_step(group, strategy, text)
    return peak.bytes


def measure(
    group: Group, strategy: str, peak: int, args: argparse.Namespace, text: Tensor
) -> dict[str, Any]:
    """The record of one strategy. All ranks must call."""
    long, short = text[: args.long], text[: args.short]
    steps = [text_step(group, strategy, long) for _ in range(args.rounds)]
    seconds = statistics.median(step.seconds for step in steps)
    mine = (peak, seconds, steps[-1].sent, steps[-1].formula)
    everyone: list[Any] = group.transport.gather_objects(mine)
    recipe = Recipe(strategy=strategy, layout=LAYOUT_OF[strategy], steps=args.steps)
    return {
        "strategy": strategy,
        "layout": LAYOUT_OF[strategy],
        "ranks": group.size,
        "peak_bytes": max(e[0] for e in everyone),
        "seconds": max(e[1] for e in everyone),
        "sent_bytes": [e[2].forward.bytes + e[2].backward.bytes for e in everyone],
        "formula_bytes": [e[3].forward.bytes + e[3].backward.bytes for e in everyone],
        "equality": {
            name: equality(group, strategy, short, getattr(torch, name))
            for name in ("float64", "float32", "bfloat16")
        },
        "losses": train(group, recipe, text),
    }


def main() -> None:
    """Measures under torchrun; rank 0 writes the records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", type=int, default=4096, help="tokens to time")
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
    record: dict[str, Any] = {}
    if group.size == 1:
        record["one device"] = one_device(text[: args.long], args.rounds)
    # Memory first, while little has been allocated.
    peaks = {strategy: peak_bytes(group, strategy, text[: args.long]) for strategy in LAYOUT_OF}
    record |= {s: measure(group, s, peak, args, text) for s, peak in peaks.items()}
    if group.rank == 0:
        args.json.write_text(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
