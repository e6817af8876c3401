"""Measures masks on one rank: time for the scores that they show, beside that of a full mask.

Ratios above 1 are what cutting a mask into parts costs. The layers are the walks over the keys.

Example: python scripts/measure/mask_costs.py --length 8192
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import seqpar
from seqpar import Mask, Plan, contiguous, masks
from seqpar.layout import Span, visible_count

CAUSAL = Mask(causal=True)


def catalogue(n: int) -> dict[str, Mask]:
    """Masks of a sequence of n tokens, by name."""
    images = [(a, a + n // 32) for a in range(n // 27, n - n // 27, n // 8)]
    return {
        "full": Mask(),
        "causal": CAUSAL,
        "prefix of a quarter": masks.prefix_lm(n // 4),
        "8 images in text": CAUSAL | masks.spans(images),
        "32 blocks, causal": masks.block_causal(masks.every(n // 32, n)),
        "a prompt and 8 answers": masks.shared_prompt(n // 2, [n // 16] * 8),
        "a tree of 16": masks.tree([n // 16] * 16, [None, *((i - 1) // 2 for i in range(1, 16))]),
        "window of an eighth": Mask(causal=True, window=n // 8),
        "window and first tokens": Mask(causal=True, window=n // 8) | CAUSAL & masks.keys(0, 64),
        "8 documents, causal": Mask(causal=True, documents=masks.every(n // 8, n)),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, args.length, 4, 64, generator=generator).requires_grad_() for _ in range(3)
    ]
    rows, whole = [], Span(0, args.length)
    print(f"torch {torch.__version__}, one thread, {args.length} tokens, 4 heads of 64, float32")
    print(f"{'mask':26}layers regions  shown  forward ms  both ms  ratios per score")
    for name, mask in catalogue(args.length).items():
        plan = Plan(seqpar.Group.alone(), contiguous(args.length, 1), mask)
        forward, both = measured(partial(step, tensors, plan), args.runs)
        shown = visible_count(mask, whole, whole) / args.length**2
        rows.append(
            {"mask": name, "forward_seconds": forward, "both_seconds": both, "shown": shown}
        )
        ratios = [rows[-1][k] / shown / rows[0][k] for k in ("forward_seconds", "both_seconds")]
        regions = sum(len(layer.regions) for layer in mask.layers)
        print(
            f"{name:26}{len(mask.layers):6}{regions:8}{shown:7.3f}{forward * 1e3:12.0f}{both * 1e3:9.0f}"
            f"  {ratios[0]:.2f} {ratios[1]:.2f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"length": args.length, "rows": rows}, indent=1) + "\n")


def step(tensors: list[Tensor], plan: Plan) -> tuple[float, float]:
    """Seconds of forward, and of both directions."""
    start = time.perf_counter()
    out = seqpar.attention(*tensors, plan)
    forward = time.perf_counter() - start
    torch.autograd.grad(out, tensors, torch.ones_like(out))
    return forward, time.perf_counter() - start


def measured(run: Callable[[], tuple[float, float]], runs: int) -> tuple[float, float]:
    """The least of each of several runs."""
    times = [run() for _ in range(runs)]
    return min(t for t, _ in times), min(t for _, t in times)


if __name__ == "__main__":
    main()
