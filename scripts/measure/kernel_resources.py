"""Compiles the Triton attention kernels ahead of time, without a GPU, and reads what they need.

The launchers of `seqpar_kernels.triton_attention` run on tensors without storage while a recorder stands
in for each kernel, so what is compiled is what a device would compile: types, alignment, constants and
the tiles of `tuning.TABLE`. Masks that lead to the same constants are compiled once and share a line.

Fails if a kernel does not compile, needs more shared memory than the device has, or spills at widths up
to 128. Spills are bytes of local memory (CUDA) or scratch (HIP) a thread; the kernels keep no arrays, so
nothing else is there. Registers are per thread. Seconds are about 0 where Triton's cache has the kernel.

Example: python scripts/measure/kernel_resources.py --targets sm_90 gfx942 --d 64 128 --json kernels.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from seqpar.commands import progress
from seqpar_kernels import Band, Block, Documents, Dropout, Rows, Score, triton_attention, tuning
from seqpar_kernels.partial import Partial, accumulation_dtype

KIB = 1024
TARGETS = {  # family -> what the compiler calls it, and shared memory of a program in bytes
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
BANDS = {"causal": Band(None, 0), "full": Band(), "window": Band(-511, 0)}
FEATURES = ("plain", "softcap", "alibi", "dropout", "documents")
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
HEADS, KV_HEADS, BATCH = 32, 8, 2
NO_SPILLS = 128  # widths up to this must not spill; wider ones may, where nothing else fits


@dataclass(frozen=True)
class Case:
    """One kernel to compile."""

    target: str
    kernel: str
    dtype: str
    d: int
    mask: str
    feature: str
    tiles: tuple[int, int, int, int]
    length: int


@dataclass
class Outcome:
    """What a compiled kernel needs, for a case and the masks that share its code."""

    case: Case
    masks: list[str]
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    shared_limit_bytes: int = 0
    seconds: float = 0.0
    error: str | None = None
    problems: list[str] = field(default_factory=list)


class Recorder:
    """Stands in for a kernel and keeps what it was last launched with."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the arguments."""
        self.args, self.kwargs = args, kwargs


def make_block(case: Case) -> Block:
    """A square block with the case's mask and feature."""
    slopes = torch.rand(HEADS) if case.feature == "alibi" else None
    softcap = 30.0 if case.feature == "softcap" else None
    score = Score(case.d**-0.5, softcap=softcap, alibi_slopes=slopes)
    drop = Dropout(0.1, 2**62) if case.feature == "dropout" else None
    documents = Documents((0, case.length // 2)) if case.feature == "documents" else None
    return Block(BANDS[case.mask], score, dropout=drop, documents=documents)


def launch(case: Case) -> Recorder:
    """The arguments that the launcher gives the kernel."""
    recorders = {f"{name}_kernel": Recorder() for name in tuning.KERNELS}
    dtype, block, tiles = getattr(torch, case.dtype), make_block(case), tuning.Tiles(*case.tiles)
    meta = {"dtype": dtype, "device": "meta"}
    q, dout, out = (torch.empty(BATCH, case.length, HEADS, case.d, **meta) for _ in range(3))
    k, v = (torch.empty(BATCH, case.length, KV_HEADS, case.d, **meta) for _ in range(2))
    with patch.multiple(triton_attention, family=lambda _: case.target, **recorders):
        if case.kernel == "forward":
            triton_attention.forward(q, k, v, block, Partial.identity(q, case.d), tiles)
        else:
            into = tuple(torch.empty_like(x, dtype=accumulation_dtype(dtype)) for x in (q, k, v))
            lse, delta, dslopes = (into[0][..., 0].contiguous() for _ in range(3))
            learned = dslopes if case.feature == "alibi" else None
            rows = Rows(q, out, dout, lse, delta)
            triton_attention.backward(rows, k, v, block, into, learned, (tiles, tiles))
    return recorders[f"{case.kernel}_kernel"]


def make_source(case: Case) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles, and its options, specialised on arguments as its launcher would."""
    kernel, launched = getattr(triton_attention, f"{case.kernel}_kernel"), launch(case)
    given = dict(zip(kernel.arg_names, launched.args, strict=False)) | launched.kwargs
    options = {name: given.pop(name) for name in list(given) if name not in kernel.arg_names}
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for n, parameter in enumerate(kernel.params):
        x = given[parameter.name]
        special = isinstance(x, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and x == 1):
            types[parameter.name], constants[n,] = "constexpr", x
            continue
        types[parameter.name] = type_name(x)
        if isinstance(x, torch.Tensor) or (special and x % 16 == 0):
            attributes[n,] = [["tt.divisibility", 16]]
        if case.target == "gfx942" and is_small(x):
            attributes[n,].append(["tt.pointer_range", 32])
    return ASTSource(kernel, types, constants, attributes), options


def type_name(x: torch.Tensor | float) -> str:
    """What Triton calls the type of an argument."""
    if isinstance(x, torch.Tensor):
        return POINTERS[x.dtype]
    if isinstance(x, float):
        return "fp32"
    return "i32" if -(2**31) <= x < 2**31 else "i64"


def is_small(x: Any) -> bool:
    """Whether 32-bit offsets reach all of a tensor, which the HIP back-end makes use of."""
    return isinstance(x, torch.Tensor) and x.numel() * x.element_size() < 2**31


def compile_case(case: Case) -> dict[str, Any]:
    """Registers, spills, shared memory and seconds, or the error."""
    source, options = make_source(case)
    start = time.perf_counter()
    try:
        kernel = triton.compile(source, target=TARGETS[case.target][0], options=options)
    except Exception as error:  # compilers raise what they like
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    return needs(kernel) | {"shared_bytes": kernel.metadata.shared, "seconds": seconds}


def needs(kernel: CompiledKernel) -> dict[str, int]:
    """Registers and spilled bytes a thread, as the assembler reports them."""
    if "amdgcn" in kernel.asm:
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"]))
        names = ("vgpr_count", "private_segment_fixed_size")
    else:
        folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            command = [folder / "cuobjdump", "--dump-resource-usage", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = dict(re.findall(r"(\w+):(\d+)", done.stdout.split("Function", 1)[1]))
        names = ("REG", "STACK")
    return dict(zip(("registers", "spill_bytes"), (int(found[x]) for x in names), strict=True))


def group_masks(cases: list[Case]) -> list[tuple[Case, list[str]]]:
    """Cases that differ, with the masks that each stands for."""
    groups: dict[str, tuple[Case, list[str]]] = {}
    for case in cases:
        source, options = make_source(case)
        known = (case.target, case.kernel, case.dtype, case.feature, source.hash(), options)
        groups.setdefault(str(known), (case, []))[1].append(case.mask)
    return list(groups.values())


def judge(outcome: Outcome) -> None:
    """Notes what is wrong with an outcome."""
    if outcome.error is not None:
        outcome.problems.append("does not compile: " + outcome.error.strip().splitlines()[-1])
        return
    shared, spilled = outcome.shared_bytes or 0, outcome.spill_bytes or 0
    if shared > outcome.shared_limit_bytes:
        outcome.problems.append(
            f"needs {shared} of {outcome.shared_limit_bytes} bytes of shared memory"
        )
    if spilled and outcome.case.d <= NO_SPILLS:
        outcome.problems.append(f"spills {spilled} bytes")


def compile_all(cases: list[Case], jobs: int) -> list[Outcome]:
    """Compiles the cases in several processes."""
    outcomes = []
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        groups = group_masks(cases)
        futures = [pool.submit(compile_case, case) for case, _ in groups]
        with progress.steps("compiling", len(groups)) as kernels:
            for _ in as_completed(futures):
                kernels.done()
        for (case, masks), future in zip(groups, futures, strict=True):
            limit = TARGETS[case.target][1]
            outcomes.append(Outcome(case, masks, shared_limit_bytes=limit, **future.result()))
            judge(outcomes[-1])
    return outcomes


def show(outcomes: list[Outcome], console: Console) -> None:
    """Prints the outcomes as a table."""
    table = Table(title="Triton kernels, compiled ahead of time")
    left = ("target", "kernel", "dtype", "feature", "mask")
    right = ("tiles", "warps", "stages", "registers", "spills", "shared", "limit", "s")
    for column in (*left, "d", *right):
        table.add_column(column, justify="left" if column in left else "right")
    for outcome in outcomes:
        case = outcome.case
        rows, cols, warps, stages = case.tiles
        found = (outcome.registers, outcome.spill_bytes, outcome.shared_bytes)
        table.add_row(
            case.target, case.kernel, case.dtype, case.feature, " = ".join(outcome.masks),
            str(case.d), f"{rows}x{cols}", str(warps), str(stages),
            *("-" if x is None else str(x) for x in found),
            str(outcome.shared_limit_bytes), f"{outcome.seconds:.1f}",
            style="red" if outcome.problems else None,
        )  # fmt: skip
    console.print(table)
    if any(len(outcome.masks) > 1 for outcome in outcomes):
        console.print("Masks joined by = have the same constants: bands are runtime arguments.")


def make_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for."""
    cases = []
    for target in args.targets:
        for kernel in args.kernels:
            for dtype in args.dtype:
                size = getattr(torch, dtype).itemsize
                for d in args.d:
                    chosen = tuning.line(target, kernel, size, d)
                    tiles = args.tiles or (chosen.rows, chosen.cols, chosen.warps, chosen.stages)
                    cases += [
                        Case(target, kernel, dtype, d, mask, feature, tuple(tiles), args.length)
                        for feature in args.features
                        for mask in args.masks
                    ]
    return cases


def main() -> None:
    """Parses arguments, compiles, prints; fails when a kernel would not run well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kernels, dtypes = tuning.KERNELS, ("bfloat16", "float16", "float32")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=list(kernels))
    parser.add_argument("--d", type=int, nargs="+", default=[64, 128, 256], help="width of a head")
    parser.add_argument("--masks", nargs="+", choices=BANDS, default=["causal", "full"])
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=["bfloat16"])
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=["plain"])
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens; tensors over 2 GiB change AMD code"
    )
    parser.add_argument(
        "--tiles", type=int, nargs=4, metavar=("ROWS", "COLS", "WARPS", "STAGES"),
        help="instead of those of the table",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true", help="by default only sm_90 and gfx942, d = 128, causal"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the results here")
    if "--quick" in sys.argv[1:]:  # narrows what is not asked for
        parser.set_defaults(targets=["sm_90", "gfx942"], d=[128], masks=["causal"])
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET must not be set: the interpreter compiles nothing")

    outcomes = compile_all(make_cases(args), args.jobs)
    console = Console(width=None if Console().is_terminal else 140)
    show(outcomes, console)
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    wrong = [
        f"{o.case.target} {o.case.kernel} {o.case.dtype} d={o.case.d} {o.case.feature}: {problem}"
        for o in outcomes
        for problem in o.problems
    ]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
