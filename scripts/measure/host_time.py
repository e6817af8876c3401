"""Host time of warm calls: of one rank beside torch's own call, and of one rank of many.

Of one rank with 64 tokens nearly all is host time. Of many ranks one is run, over messages that nobody sends
and without the products, so what is left is who meets whom, buffers and messages. CPU time, the least of
several rounds, in milliseconds.

Example: python scripts/measure/host_time.py --ranks 64 1024 4096 --json host_time.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from seqpar import Group, Mask, Plan, attention, zigzag
from seqpar.comm import silent
from seqpar.commands.arguments import parser_of
from seqpar.layout import balanced

ROUNDS = 5
TOKENS, HEADS, WIDTH = 64, 4, 16


def timed(forward: Callable[[], Tensor], calls: int) -> tuple[float, float]:
    """(milliseconds of a forward, of its backward)."""
    grad = torch.ones_like(forward())
    best = [float("inf")] * 2
    for _ in range(ROUNDS):
        total = [0.0, 0.0]
        for _ in range(calls):
            start = time.process_time()
            out = forward()
            between = time.process_time()
            out.backward(grad)
            total[0] += between - start
            total[1] += time.process_time() - between
        best = [min(b, 1e3 * t / calls) for b, t in zip(best, total, strict=True)]
    return best[0], best[1]


def tensors(rows: int) -> list[Tensor]:
    """q, k and v that learn."""
    return [torch.zeros(1, rows, HEADS, WIDTH, requires_grad=True) for _ in range(3)]


def of_torch() -> tuple[float, float]:
    """Milliseconds of torch's own call."""
    q, k, v = (x.transpose(1, 2) for x in tensors(TOKENS))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return timed(lambda: sdpa(q, k, v, is_causal=True), 200)


def of_one_rank(strategy: str) -> tuple[float, float]:
    """Milliseconds where there is nobody to talk to."""
    plan = Plan(Group.alone(), zigzag(TOKENS, 1), Mask(causal=True), strategy=strategy)
    q, k, v = tensors(TOKENS)
    return timed(lambda: attention(q, k, v, plan), 200)


def of_many(strategy: str, size: int) -> tuple[float, float]:
    """Milliseconds of one of so many ranks, but for products."""
    plan = Plan(
        silent(size // 2, size), zigzag(4 * size, size), Mask(causal=True), strategy=strategy
    )
    q, k, v = tensors(4)
    with patch.object(Plan, "blocks", lambda *_: iter(())):
        return timed(lambda: attention(q, k, v, plan), 1)


def of_balanced(size: int) -> float:
    """Milliseconds to deal 1,000 packed documents of a million positions."""
    generator = torch.Generator().manual_seed(0)
    inner = torch.randperm(10**6 - 1, generator=generator)[:999] + 1
    mask = Mask(causal=True, documents=(0, *sorted(inner.tolist()), 10**6))
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        balanced(10**6, size, mask)
        best = min(best, 1e3 * (time.process_time() - start))
    return best


def main() -> None:
    """Prints a table, and writes it if asked."""
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"one rank, {TOKENS} tokens: forward, backward in ms")
    one = {"torch's own": of_torch(), **{name: of_one_rank(name) for name in ("ring", "ulysses")}}
    for name, (forward, backward) in one.items():
        print(f"  {name:12} {forward:7.3f} {backward:7.3f}")
    print("one of many ranks, without products: forward, backward in ms")
    many = {}
    for name in ("ring", "ulysses", "allgather"):
        for size in args.ranks:
            forward, backward = many[f"{name} {size}"] = of_many(name, size)
            print(f"  {name:12} P = {size:4} {forward:8.2f} {backward:8.2f}", flush=True)
    dealt = {size: of_balanced(size) for size in args.ranks}
    for size, took in dealt.items():
        print(f"balanced, 1,000 documents, P = {size}: {took:.1f} ms")
    if args.json:
        found = {"torch": torch.__version__, "one": one, "many": many, "balanced": dealt}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
