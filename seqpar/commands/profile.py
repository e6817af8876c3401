"""`seqpar doctor --measure`: times the implementations of this machine's device, and keeps what was found.

A problem is a whole call of one rank, forward and backward. Every implementation is compared with the
reference before it is timed; one that is wrong or fails is named and not kept. Rounds alternate between all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl
from torch.utils.benchmark import Timer

from seqpar.comm import Group
from seqpar.functional import attention
from seqpar.layout import Mask, contiguous
from seqpar.strategies import Plan
from seqpar_kernels import IMPLEMENTATIONS, Implementation, Request, refusal
from seqpar_kernels.profile import Kind, Problem, Profile, device_name

WIDTHS = (64, 128, 256)
LENGTHS = {"cuda": (1024, 4096, 16384), "cpu": (256, 2048)}
ALL_WIDTHS = 2048  # of all heads together
SMALL = 512  # tokens where results are compared
ALLOWED = 2e-2  # of the norm; what computes in bfloat16 is off by 3e-3
WARM_UPS = 2
# Documents, and whether there is a window, of a sixteenth of the tokens.
MASKS = ((1, False), (1, True), (4, False), (32, False))

Say = Callable[[str], None]


def measure(
    device: torch.device,
    say: Say,
    *,
    widths: Sequence[int] = WIDTHS,
    lengths: Sequence[int] | None = None,
    rounds: int = 5,
) -> Profile:
    """Times all implementations on all problems, in bfloat16; says each result.

    Raises:
        ValueError: rounds is not positive, or fewer than two implementations can do anything here: there is
            no choice to measure.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    lengths = LENGTHS[device.type] if lengths is None else lengths
    problems = []
    for width in widths:
        for length in lengths:
            for documents, windowed in MASKS:
                kind = Kind(16, width, length, documents, windowed)
                found = Problem(kind, *_seconds(kind, device, rounds, say))
                problems.append(found)
                told = ", ".join(f"{n} {1e3 * found.seconds[n]:.3g} ms" for n in found.fastest)
                say(f"{_words(kind)}: {told or 'nothing computes it'}")
    if all(len(problem.seconds) < 2 for problem in problems):
        raise ValueError(f"there is no choice to measure on {device_name(device)}")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    flash = f", {name}" if (name := current_flash_attention_impl()) else ""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    how = f"torch {torch.__version__}{flash}, {now}: seqpar doctor --measure"
    kept = tuple(problem for problem in problems if problem.seconds or problem.wrong)
    return Profile(device_name(device), capability, how, kept)


def _seconds(
    kind: Kind, device: torch.device, rounds: int, say: Say
) -> tuple[dict[str, float], tuple[str, ...]]:
    """(the median time of each implementation that can do it and is right, those that are not)."""
    wrong: list[str] = []
    steps: dict[Implementation, Callable[[], list[Tensor]]] = {}
    small = kind._replace(length=min(kind.length, SMALL))
    expected = _step(small, device, "reference")()
    for name in _able(kind, device):
        try:
            found = _step(small, device, name)()
            each = [_deviation(x, y) for x, y in zip(found, expected, strict=True)]
            # `max` alone drops a NaN, which is the worst of all.
            off = max(each, key=lambda x: math.inf if math.isnan(x) else x)
            if not off <= ALLOWED:
                say(
                    f"{_words(small)}: {name} is WRONG, off by {off:.1g} of the norm, and is not timed"
                )
                wrong.append(name)
                continue
            steps[name] = _step(kind, device, name)
            for _ in range(WARM_UPS):
                steps[name]()
        except Exception as error:  # whatever it is, the others go on
            steps.pop(name, None)
            wrong.append(name)
            say(f"{_words(kind)}: {name} FAILED and is not timed: {type(error).__name__}: {error}")
    # docs/design.md: what computes was measured
    timers = {name: Timer("step()", globals={"step": step}) for name, step in steps.items()}
    times: dict[Implementation, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():  # which waits for the device before and after
            times[name].append(timer.timeit(1).mean)
    medians: dict[str, float] = {}
    for name, took in times.items():
        medians[name] = float(f"{statistics.median(took):.4g}")
    return medians, tuple(wrong)


def _deviation(x: Tensor, y: Tensor) -> float:
    """How far a result is from the expected one, by the norm; of what should be about 0, by 0.01 a number."""
    return float((x - y).norm() / y.norm().clamp(min=0.01 * y.numel() ** 0.5))


def _able(kind: Kind, device: torch.device) -> Iterator[Implementation]:
    """The implementations worth timing: the interpreter is never, the reference on CPU alone."""
    asked = Request(device, torch.bfloat16, kind.width, kind.width, windowed=kind.windowed)
    for name in IMPLEMENTATIONS:
        slow = "triton" if device.type == "cpu" else "reference"
        if name != slow and refusal(name, asked) is None:
            yield name


def _step(kind: Kind, device: torch.device, name: Implementation) -> Callable[[], list[Tensor]]:
    """A forward and backward of one implementation, which gives out and the gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, kind.length, max(ALL_WIDTHS // kind.width, 1), kind.width
    q, k, v, dout = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bounds = tuple(n * kind.length // kind.documents for n in range(kind.documents + 1))
    mask = Mask(
        causal=True,
        window=max(kind.length // 16, 1) if kind.windowed else None,
        documents=bounds if kind.documents > 1 else None,
    )
    plan = Plan(Group.alone(), contiguous(kind.length, 1), mask, implementation=name)

    def step() -> list[Tensor]:
        out = attention(q, k, v, plan)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return step


def _words(kind: Kind) -> str:
    mask = (
        f", {kind.documents} documents"
        if kind.documents > 1
        else ", window"
        if kind.windowed
        else ""
    )
    return f"{kind.length} tokens, heads of {kind.width}{mask}"
