"""Launches the kernels of one forward and backward on a CUDA GPU, for tools that look at each launch.

Example: ncu --set full python scripts/measure/gpu_launches.py --tokens 16384
Example: compute-sanitizer --tool racecheck python scripts/measure/gpu_launches.py --tokens 333 --documents 3
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from seqpar.commands.arguments import parser_of
from seqpar_kernels import (
    IMPLEMENTATIONS,
    Band,
    Block,
    Partial,
    Ranges,
    Rows,
    Score,
    attend,
    attend_backward,
    finish,
)


def tell_launches(step: Callable[[], object], times: int = 5) -> None:
    """Prints each launch of a step, in order, with the median of its microseconds."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(times):
            step()
        torch.cuda.synchronize()
    events = sorted(profiled.events(), key=lambda e: e.time_range.start)
    # What the host did to launch them is recorded too.
    on_device = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    launches = [(e.name, e.time_range.elapsed_us()) for e in on_device]
    count = len(launches) // times
    for n in range(count):
        took = statistics.median(us for _, us in launches[n::count])
        print(f"{took:9.1f} us  {launches[n][0][:90]}")


def main() -> None:
    """Parses arguments, launches, and fails if a result is not finite."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=333)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--window", type=int, help="positions a row sees before itself")
    parser.add_argument("--documents", type=int, default=1, help="packed, of equal lengths")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="triton")
    parser.add_argument("--device", default="cuda", help="cpu: to try the script")
    parser.add_argument("--profile", action="store_true", help="print each launch and its time")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_launches.py needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        raise SystemExit(2)

    n, name = args.tokens, args.implementation
    shapes = [
        (1, n, heads, args.d) for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    ]
    dtype = getattr(torch, args.dtype)
    q, k, v, dout = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    bounds = tuple(range(0, n, -(-n // args.documents)))
    documents = (Ranges.documents(bounds),) if args.documents > 1 else ()
    band = Band(None if args.window is None else -args.window, 0)
    score = Score(softcap=args.softcap).resolve(args.d)
    block = Block(band, score, terms=documents)

    def step() -> tuple[torch.Tensor, ...]:
        running = Partial.identity(q, args.d)
        attend(q, k, v, block, into=running, implementation=name)
        out, lse = finish(running, q.dtype, score, implementation=name)
        rows = Rows.of(q, out, dout, lse, implementation=name)
        into = tuple(torch.zeros(x.shape, device=device) for x in (q, k, v))
        attend_backward(rows, k, v, block, into=into, implementation=name)
        return out, lse, *into

    results = step()
    assert all(bool(torch.isfinite(x).all()) for x in results)
    if args.profile:
        tell_launches(step)
    print(f"{name}: {n} tokens, all finite")


if __name__ == "__main__":
    main()
