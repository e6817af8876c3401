"""Measures the peak memory of a rank against N and P, and the longest sequence that then fits.

Forward and backward of causal attention: every strategy on P ranks, and one device with its N x N
scores stored and not. Each measurement is made in processes of its own, after a tiny step that
starts threads and connections; it counts the rank's own q, k, v, dout and gradients, and the rank
that needs most counts. A line (with stored scores a parabola) is fitted to the measured lengths and
says how long a sequence fits `--memory-mib` per rank.

Freed tensors go back to the system at once, as they do above 32 MiB whatever is set. glibc would
keep many of the small ones measured here in its heap: 5 to 35 % more, another share at every
length. `--mmap-threshold-kib 0` lets it. Linux with glibc only.

Example: python scripts/measure/peak_memory.py --memory-mib 256 --verify --plot memory.png
"""

from __future__ import annotations

import json
from pathlib import Path

from memory_study.curves import plot
from memory_study.study import VERIFY_FACTOR, failures, study, verify
from memory_study.subjects import Setting
from memory_study.tables import show
from rich.console import Console

from seqpar.commands.arguments import parser_of


def main() -> None:
    """Parses arguments, measures, prints; fails when one of the `failures` is found."""
    parser = parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--memory-mib", type=float, default=64.0, help="per rank (%(default)s)")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--d", type=int, default=32, help="width of a head")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--mmap-threshold-kib", type=int, default=64, help="0: glibc's own")
    parser.add_argument("--repeats", type=int, default=1, help="measure so often, take the median")
    parser.add_argument(
        "--verify", action="store_true",
        help=f"also measure the longest N, or {VERIFY_FACTOR} x the longest of --lengths if shorter",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, help="draw into this file")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if len(set(args.lengths)) < 3:
        parser.error(f"a line has a misfit from three lengths on, got --lengths {args.lengths}")
    if min(*args.lengths, *args.ranks, args.repeats, args.heads, args.d) < 1:
        parser.error("lengths, ranks, repeats, heads and d must be at least 1")

    setting = Setting(args.heads, args.d, args.dtype, args.mmap_threshold_kib * 2**10)
    result = study(args.lengths, args.ranks, args.memory_mib, setting, args.repeats)
    if args.verify:
        result["verified"] = verify(result)
    result["failures"] = failures(result)
    show(result, Console())
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(result, args.plot)
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
