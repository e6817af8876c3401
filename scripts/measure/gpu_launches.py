"""Launches the kernels of one forward and backward on a CUDA GPU, for tools that look at each launch.

Example: ncu --set full python scripts/measure/gpu_launches.py --tokens 16384
Example: compute-sanitizer --tool racecheck python scripts/measure/gpu_launches.py --tokens 333 --documents
"""

from __future__ import annotations

import sys

import torch

from seqpar.commands.arguments import parser_of
from seqpar_kernels import (
    IMPLEMENTATIONS,
    Band,
    Block,
    Documents,
    Partial,
    Rows,
    Score,
    attend,
    attend_backward,
    finish,
)


def main() -> None:
    """Parses arguments, launches, and fails if a result is not finite."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=333)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--window", type=int, help="positions a row sees before itself")
    parser.add_argument("--documents", action="store_true", help="three packed documents")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="triton")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_launches.py needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        raise SystemExit(2)

    n, name = args.tokens, args.implementation
    shapes = [
        (1, n, heads, args.d) for heads in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    ]
    dtype = getattr(torch, args.dtype)
    q, k, v, dout = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    documents = (Documents((0, n // 3, n // 2)),) if args.documents else ()
    band = Band(None if args.window is None else -args.window, 0)
    score = Score(softcap=args.softcap).resolve(args.d)
    block = Block(band, score, terms=documents)
    running = Partial.identity(q, args.d)
    attend(q, k, v, block, into=running, implementation=name)
    out, lse = finish(running, q.dtype, score, implementation=name)
    rows = Rows.of(q, out, dout, lse, implementation=name)
    into = tuple(torch.zeros(x.shape, device="cuda") for x in (q, k, v))
    attend_backward(rows, k, v, block, into=into, implementation=name)
    assert all(bool(torch.isfinite(x).all()) for x in (out, lse, *into))
    print(f"{name}: {n} tokens, all finite")


if __name__ == "__main__":
    main()
