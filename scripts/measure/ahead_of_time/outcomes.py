"""What compiled kernels need of a device, and what is wrong with that."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.compiler import CompiledKernel

from ahead_of_time.cases import TARGETS, Case
from ahead_of_time.sources import make_source
from seqpar.commands import progress

NO_SPILLS = 128  # widths up to this must not spill; wider ones may, where nothing else fits


@dataclass
class Outcome:
    """What a compiled kernel needs, for a case and the masks that share its code."""

    case: Case
    masks: list[str]
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    shared_limit_bytes: int = 0
    mixed_descriptors: int = 0
    seconds: float = 0.0
    error: str | None = None
    problems: list[str] = field(default_factory=list)


def compile_case(case: Case) -> dict[str, Any]:
    """Registers, spills, shared memory and seconds, or the error."""
    source, options = make_source(case)
    start = time.perf_counter()
    try:
        kernel = triton.compile(source, target=TARGETS[case.target][0], options=options)
    except Exception as error:  # compilers raise what they like
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - start}
    seconds = time.perf_counter() - start
    found = {"shared_bytes": kernel.metadata.shared, "seconds": seconds}
    return (
        needs(kernel) | found | {"mixed_descriptors": mixed_descriptors(kernel.asm.get("ptx", ""))}
    )


def mixed_descriptors(ptx: str) -> int:
    """How many addresses have matrix descriptors of several swizzles made of them.

    The assembler of CUDA 12.8, which Triton 3.6 and 3.7 bring, loses a copy of such an address now and then,
    and a product reads other memory. A descriptor is an address below a constant, whose two highest bits are
    the swizzle.
    """
    swizzles: dict[str, set[int]] = {}
    for address, constant in re.findall(r"(?:or|add)\.[bs]64\s+%rd\d+, %(rd\d+), (-?\d+);", ptx):
        high = int(constant) % 2**64 >> 62
        if high and abs(int(constant)) > 2**40:  # and not a distance
            swizzles.setdefault(address, set()).add(high)
    return sum(len(of) > 1 for of in swizzles.values())


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
    if outcome.mixed_descriptors:
        outcome.problems.append(
            f"makes descriptors of several swizzles of {outcome.mixed_descriptors} addresses"
        )
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
