"""Measures the block kernels on a CUDA GPU, in one run, beside torch's own attention.

Rates: TFLOP/s of each implementation on one block, forward and backward, beside torch's
scaled_dot_product_attention (flash and cuDNN) and FlexAttention, and how far each is from float64.
FLOPs are 4 * heads * rows * columns * d, half of that if causal, 2.5 times that backward.

Ring tax: what all blocks of all ranks of a ring take, one after the other on this one GPU, over what
the whole sequence takes in one block. It is what a ring pays before it sends anything.

With --tune, instead: candidates for the tiles of the Triton kernels.

Example: python scripts/measure/kernel_speed.py --quick --json kernels.json --markdown kernels.md
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.attention
from kernel_race.contenders import Contender, Ranks, contenders, exact, implementations
from kernel_race.race import (
    NAMES,
    Timing,
    brief,
    described,
    deviations,
    median_max,
    median_sum,
    race,
)
from kernel_race.setting import QUICK, RING, SETTINGS, TUNED, Setting
from kernel_race.sheet import Sheet
from kernel_race.tune import CANDIDATES, tune, tune_sheet
from rich.console import Console

from seqpar.commands.arguments import parser_of
from seqpar.layout import LAYOUTS
from seqpar.layout.shards import whole
from seqpar_kernels import Implementation

Measure = partial[list[dict[str, Any]]]
SMALL = 2048  # tokens where errors are measured
RANKS, ROWS = (2, 4, 8), 8192
RING_LAYOUTS = ("zigzag", "contiguous")


def rates(
    setting: Setting,
    rounds: int,
    device: torch.device,
    *,
    small: int = SMALL,
) -> list[dict[str, Any]]:
    """A record for each contender: times and rates, and errors at a size of `small` tokens."""
    timings = race(contenders(setting, setting.tensors(device)), rounds, device)
    smaller = replace(setting, tokens=min(small, setting.tokens))
    tensors = smaller.tensors(device)
    expected, _ = exact(tensors, smaller.mask)
    errors = deviations(contenders(smaller, tensors), expected)
    return [rate(setting, name, timings[name], errors[name]) for name in timings]


def rate(
    setting: Setting, name: str, timing: Timing, deviation: dict[str, float] | str
) -> dict[str, Any]:
    """The record of one contender."""
    record: dict[str, Any] = {"setting": str(setting), "contender": name, "errors": deviation}
    record["error"] = timing.error or (deviation if isinstance(deviation, str) else None)
    for part, flops in (
        ("forward", setting.forward_flops),
        ("backward", setting.backward_flops),
    ):
        steps = getattr(timing, part)
        seconds = median_sum(steps) if steps else None
        record[f"{part}_seconds"] = seconds
        record[f"{part}_tflops"] = None if seconds is None else flops / seconds / 1e12
        record[f"{part}_rounds"] = [sum(x) for x in steps]
    return record


def ring_tax(
    setting: Setting,
    ranks: int,
    implementation: Implementation,
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """A record for each layout: time of all ranks together over that of one block, and so on.

    `*_slowest` is the time of the slowest rank, `ranks` times over that of one block: what a ring
    whose messages cost nothing takes, over its fair share.
    """
    tensors = setting.tensors(device)
    layouts = {"whole": whole(setting.tokens)}
    layouts |= {kind: LAYOUTS[kind](setting.tokens, ranks) for kind in RING_LAYOUTS}

    def make(name: str) -> Contender:
        return Ranks(tensors, layouts[name], setting.mask, implementation)

    timings = race({name: partial(make, name) for name in layouts}, rounds, device)
    one = timings.pop("whole")
    return [
        {
            "setting": str(setting), "ranks": ranks, "implementation": implementation,
            "layout": kind, "error": one.error or timing.error,
            **(tax(one, timing, ranks) if not (one.error or timing.error) else {}),
        }
        for kind, timing in timings.items()
    ]  # fmt: skip


def tax(one: Timing, ring: Timing, ranks: int) -> dict[str, float]:
    """Times and ratios of both directions."""
    numbers = {}
    for part in ("forward", "backward"):
        alone, together = median_sum(getattr(one, part)), median_sum(getattr(ring, part))
        slowest = median_max(getattr(ring, part))
        numbers[f"{part}_one_block_seconds"] = alone
        numbers[f"{part}_ring_seconds"] = together
        numbers[f"{part}_tax"] = together / alone
        numbers[f"{part}_slowest"] = ranks * slowest / alone
    return numbers


def rate_sheet(records: Sequence[dict[str, Any]]) -> Sheet:
    """The contenders of a setting as a table."""
    rows = []
    for r in records:
        cells = [r["contender"]]
        for part in ("forward", "backward"):
            seconds, tflops = r[f"{part}_seconds"], r[f"{part}_tflops"]
            cells += ["", ""] if seconds is None else [f"{1e3 * seconds:.3f}", f"{tflops:.0f}"]
        errors = r["errors"]
        cells += [f"{errors[n]:.1e}" if isinstance(errors, dict) else "" for n in NAMES]
        rows.append((*cells, brief(r["error"])))
    columns = ("", "fwd ms", "fwd TFLOP/s", "bwd ms", "bwd TFLOP/s")
    columns += (*(f"{name} error" for name in NAMES), "failure")
    return Sheet(records[0]["setting"], columns, rows)


def ring_sheet(records: Sequence[dict[str, Any]]) -> Sheet:
    """Ring taxes as a table."""
    rows = []
    for r in records:
        cells = [str(r["ranks"]), r["layout"], r["implementation"]]
        for part in ("forward", "backward"):
            if r["error"] is not None:
                cells += ["", "", ""]
                continue
            cells.append(f"{1e3 * r[f'{part}_one_block_seconds']:.2f}")
            cells += [f"{r[f'{part}_{what}']:.3f}" for what in ("tax", "slowest")]
        rows.append((*cells, brief(r["error"])))
    columns = ["P", "layout", "implementation"]
    for part in ("fwd", "bwd"):
        columns += [f"{part} one block ms", f"{part} tax", f"{part} slowest rank"]
    title = (
        "Ring tax: all ranks' blocks in turn over one block; the slowest rank, times P, likewise"
    )
    return Sheet(f"{title}. {records[0]['setting']}", (*columns, "failure"), rows, 3)


SHEETS = {"rates": rate_sheet, "ring": ring_sheet, "tune": tune_sheet}


def circumstances(device: torch.device) -> dict[str, Any]:
    """Where, when and how this was measured."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "torch": torch.__version__, "triton": triton, "python": platform.python_version(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip


def markdown(facts: dict[str, Any], sheets: Sequence[Sheet]) -> str:
    """Everything as a section of docs/benchmarks."""
    versions = f"torch {facts['torch']}, triton {facts['triton']}, Python {facts['python']}"
    lines = [f"{facts['device']}, {versions}, {facts['date']}: `{facts['command']}`.", ""]
    for sheet in sheets:
        lines += [*sheet.markdown(), ""]
    return "\n".join(lines)


def stages(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Measure]]:
    """(kind, what measures it) for each thing that was asked for."""
    if args.tune is not None:
        for kernel in args.tune or CANDIDATES:
            for setting in TUNED if args.settings is None else [TUNED[n] for n in args.settings]:
                yield (
                    "tune",
                    partial(tune, kernel, setting, CANDIDATES[kernel], args.rounds, device),
                )
        return
    if "rates" in args.parts:
        chosen = QUICK if args.quick else SETTINGS
        if args.settings is not None:
            chosen = [SETTINGS[n] for n in args.settings]
        for setting in chosen:
            yield "rates", partial(rates, setting, args.rounds, device)
    if "ring" in args.parts:
        for ranks in RANKS[:2] if args.quick else RANKS:
            setting = replace(RING, tokens=ROWS * ranks)
            for name in implementations(setting, device):
                yield "ring", partial(ring_tax, setting, ranks, name, args.rounds, device)


def main() -> None:
    """Parses arguments, measures, prints and writes after every stage what there is so far."""
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer settings and ranks")
    parser.add_argument("--parts", nargs="+", choices=("rates", "ring"), default=["rates", "ring"])
    parser.add_argument(
        "--tune", nargs="*", choices=tuple(CANDIDATES), help="these kernels' tiles; by default all"
    )
    parser.add_argument(
        "--settings", type=int, nargs="+", metavar="N",
        help="these alone, counted from 0",
    )  # fmt: skip
    parser.add_argument(
        "--flash", help="what stands under torch's flash attention: FA3 or FA4, if installed"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    args = parser.parse_args()
    most = len(SETTINGS if args.tune is None else TUNED)
    if not all(0 <= n < most for n in args.settings or ()):
        parser.error(f"--settings counts from 0 to {most - 1} here")
    if not torch.cuda.is_available():
        print(
            "kernel_speed.py needs a CUDA GPU and a torch that is built for it, "
            f"and torch {torch.__version__} sees none here.",
            file=sys.stderr,
        )
        raise SystemExit(2)

    if args.flash is not None:
        torch.nn.attention.activate_flash_attention_impl(args.flash)
    device, console = torch.device("cuda"), Console()
    facts, sheets, failures = circumstances(device), [], []
    results: dict[str, Any] = {
        **facts,
        "failures": failures,
        "rates": [],
        "ring": [],
        "tune": [],
    }
    for kind, measure in stages(args, device):
        try:
            records = measure()
        except Exception as error:  # whatever it is, the other stages go on
            failures.append(f"{kind} {measure.args[:2]}: {described(error)}")
            console.print(f"FAILED {failures[-1]}", markup=False)
        else:
            results[kind] += records
            sheets.append(SHEETS[kind](records))
            console.print(sheets[-1].rich())
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text(markdown(facts, sheets))
        torch.cuda.empty_cache()
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
