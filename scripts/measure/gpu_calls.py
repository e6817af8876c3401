"""Measures whole calls on a CUDA GPU: host time, waits for the device, memory, graphs, compiled code.

Host time is what passes until forward, or backward, returns; the device may still compute. A wait is a
place where the host stops for the device, as torch's synchronisation debug mode tells it. Ranks beyond
one are threads that share the GPU, which say where a call waits, not how fast it is.

Example: python scripts/measure/gpu_calls.py --json calls.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_race.race import described
from kernel_speed import circumstances
from torch import Tensor

import seqpar
from seqpar import Mask, Plan
from seqpar.comm import Group
from seqpar.commands.arguments import parser_of
from seqpar.layout import zigzag
from seqpar.strategies import STRATEGIES
from seqpar.testing import meet

HEADS, D, DTYPE = 16, 128, torch.bfloat16
TOKENS = (1024, 2048, 4096, 8192, 16384)
ROUNDS = 20
WAITING = 2048  # tokens of the calls whose waits are looked for
MASKS = {
    "causal": Mask(causal=True),
    "documents": Mask(causal=True, documents=(0, WAITING // 3, WAITING // 2, WAITING)),
    "window": Mask(causal=True, window=WAITING // 4),
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def plan_of(group: Group, tokens: int, strategy: str, mask: Mask, implementation: Any) -> Plan:
    """The plan of a call."""
    grid = group.grid(ulysses=min(2, group.size)) if STRATEGIES[strategy].needs_grid else None
    return Plan(
        group, zigzag(tokens, group.size), mask, strategy=strategy, grid=grid,
        implementation=implementation,
    )  # fmt: skip


def tensors(tokens: int, device: torch.device) -> list[Tensor]:
    """q, k, v, which learn, and dout: `[1 tokens HEADS D]`."""
    made = [torch.randn(1, tokens, HEADS, D, dtype=DTYPE, device=device) for _ in range(4)]
    return [x.requires_grad_() for x in made[:3]] + made[3:]


def seqpar_attention(strategy: str, tokens: int, implementation: Any = None) -> Attend:
    """Attention of one rank."""
    plan = plan_of(Group.alone(), tokens, strategy, Mask(causal=True), implementation)
    return lambda q, k, v: seqpar.attention(q, k, v, plan)


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def attentions(tokens: int) -> dict[str, Attend]:
    """Everyone whose calls are measured."""
    ours: dict[str, Attend] = {
        f"{strategy} {name or 'by default'}": seqpar_attention(strategy, tokens, name)
        for strategy, name in (
            ("ulysses", None), ("ring", None), ("ring", "aten"), ("ring", "cudnn"), ("ring", "triton"),
        )
    }  # fmt: skip
    return {"torch": torch_attention, **ours}


def host_and_memory(tokens: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """A record for each attention: microseconds of host and device, bytes at the peak."""
    for name, attend in attentions(tokens).items():
        *leaves, dout = tensors(tokens, device)
        seconds: dict[str, list[float]] = {"forward": [], "backward": [], "device": []}
        try:
            for n in range(-3, ROUNDS):
                torch.cuda.synchronize(device)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                times = [time.perf_counter()]
                out = attend(*leaves)
                times.append(time.perf_counter())
                torch.autograd.grad(out, leaves, dout)
                times.append(time.perf_counter())
                end.record()
                torch.cuda.synchronize(device)
                if n >= 0:
                    seconds["forward"].append(times[1] - times[0])
                    seconds["backward"].append(times[2] - times[1])
                    seconds["device"].append(start.elapsed_time(end) / 1e3)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            torch.autograd.grad(attend(*leaves), leaves, dout)
            peak = torch.cuda.max_memory_allocated(device) - before
        except Exception as error:  # whatever it is, the others go on
            yield {"tokens": tokens, "attention": name, "error": described(error)}
            continue
        yield {
            "tokens": tokens, "attention": name, "peak_bytes": peak,
            **{f"{part}_us": 1e6 * statistics.median(of) for part, of in seconds.items()},
        }  # fmt: skip


def waits(size: int, strategy: str, mask: str, device: torch.device) -> dict[str, Any]:
    """Where the second call of a plan waits for the device, forward and backward."""
    found = Counter[str]()
    everyone = tensors(WAITING, device)

    def told(message: Any, _: Any, filename: str, lineno: int, *__: Any) -> None:
        if "synchroniz" in str(message):
            found[f"{Path(filename).parent.name}/{Path(filename).name}:{lineno}"] += 1

    def run(group: Group) -> None:
        plan = plan_of(group, WAITING, strategy, MASKS[mask], None)
        at = plan.layout.positions(group.rank).to(device)
        *leaves, dout = (x.detach()[:, at] for x in everyone)
        leaves = [x.requires_grad_() for x in leaves]
        for n in range(2):
            meet(group)
            if n:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                out = seqpar.attention(*leaves, plan)
                torch.autograd.grad(out, leaves, dout)
                meet(group)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    record: dict[str, Any] = {"ranks": size, "strategy": strategy, "mask": mask}
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = told
        try:
            seqpar.simulate(size, run)
        except Exception as error:  # whatever it is, the others go on
            record["error"] = described(error)
    return {**record, "waits": dict(found)}


def off_by(got: Sequence[Tensor], want: Sequence[Tensor]) -> dict[str, float]:
    """The largest difference of each gradient; 0 where all bits are the same."""
    differences = (
        0.0 if torch.equal(x, y) else float((x.float() - y.float()).abs().max())
        for x, y in zip(got, want, strict=True)
    )
    return dict(zip(("dq", "dk", "dv"), differences, strict=True))


def captured(strategy: str, device: torch.device) -> dict[str, Any]:
    """How far the gradients of a CUDA graph of forward and backward are from those of the call."""
    attend = seqpar_attention(strategy, 2048)
    *leaves, dout = tensors(2048, device)
    record: dict[str, Any] = {"what": f"CUDA graph of {strategy}"}
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                want = torch.autograd.grad(attend(*leaves), leaves, dout)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = torch.autograd.grad(attend(*leaves), leaves, dout)
        graph.replay()
        torch.cuda.synchronize(device)
        record["off_by"] = off_by(got, want)
    except Exception as error:  # what cannot be captured says why
        record["error"] = described(error)[:300]
    return record


def compiled(strategy: str, mode: str, device: torch.device) -> dict[str, Any]:
    """How far compiled code is from the call, and microseconds a forward and backward."""
    attend = seqpar_attention(strategy, 2048)
    *leaves, dout = tensors(2048, device)
    record: dict[str, Any] = {"what": f"{strategy}, torch.compile {mode}"}
    try:
        want = torch.autograd.grad(attend(*leaves), leaves, dout)
        torch.compiler.reset()
        run = torch.compile(attend, fullgraph=True, mode=mode)
        for _ in range(4):
            got = torch.autograd.grad(run(*leaves), leaves, dout)
        record["off_by"] = off_by(got, want)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(ROUNDS):
            torch.autograd.grad(run(*leaves), leaves, dout)
        record["host_us"] = 1e6 * (time.perf_counter() - start) / ROUNDS
        torch.cuda.synchronize(device)
    except Exception as error:  # what cannot be compiled says why
        record["error"] = described(error)[:600]
    return record


def main() -> None:
    """Measures, prints a line for each record and writes after every one what there is so far."""
    parser = parser_of(__doc__)
    parts = ("calls", "others", "waits")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--json", type=Path, help="write the records here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_calls.py needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cuda")
    results: dict[str, Any] = {**circumstances(device), "calls": [], "waits": [], "others": []}

    def keep(kind: str, record: dict[str, Any]) -> None:
        results[kind].append(record)
        print(json.dumps(record), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")

    if "calls" in args.parts:
        for tokens in TOKENS:
            for record in host_and_memory(tokens, device):
                keep("calls", record)
    if "others" in args.parts:
        for strategy in ("ulysses", "ring"):
            keep("others", compiled(strategy, "default", device))
            keep("others", compiled(strategy, "reduce-overhead", device))
            keep("others", captured(strategy, device))
    if "waits" in args.parts:
        for strategy, mask in product(STRATEGIES, MASKS):
            keep("waits", waits(1, strategy, mask, device))
        for strategy, mask in product(("ring", "ulysses", "allgather"), MASKS):
            keep("waits", waits(2, strategy, mask, device))


if __name__ == "__main__":
    main()
