"""How contenders are measured: interleaved rounds, medians, distance from float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernel_race.contenders import Contender, Makers, Step
from kernel_race.setting import Tensors

WARM_UPS = 2
SCRATCH_BYTES = 2**30  # more than any L2 cache; 0.2 ms of an H200
NAMES = ("out", "dq", "dk", "dv")


@dataclass
class Timing:
    """Seconds of each step of each round, or why there are none."""

    forward: list[list[float]] = field(default_factory=list)
    backward: list[list[float]] = field(default_factory=list)
    error: str | None = None


def race(makers: Makers, rounds: int, device: torch.device) -> dict[str, Timing]:
    """Times everyone in turn, `rounds` times after warming up; who fails once is out, with the reason."""
    timings = {name: Timing() for name in makers}
    made: dict[str, Contender] = {}
    for n in range(-WARM_UPS, rounds):
        for name, timing in timings.items():
            if timing.error is not None:
                continue
            try:
                if name not in made:
                    made[name] = makers[name]()
                steps = made[name].forward, made[name].backward
                seconds = step_seconds([*steps[0], *steps[1]], device)
            except Exception as error:  # whatever it is, the others go on
                timings[name] = Timing(error=described(error))
                made.pop(name, None)
                continue
            if n >= 0:
                timing.forward.append(seconds[: len(steps[0])])
                timing.backward.append(seconds[len(steps[0]) :])
    return timings


def step_seconds(steps: Sequence[Step], device: torch.device) -> list[float]:
    """Seconds of each of the steps, run in order. On a GPU by events, from a cold L2 cache.

    Filling the scratch buffer also keeps the GPU busy while the first step is launched.
    """
    if device.type != "cuda":
        times = [time.perf_counter()]
        for step in steps:
            step()
            times.append(time.perf_counter())
        return [b - a for a, b in zip(times[:-1], times[1:], strict=True)]
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device=device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    torch.cuda.synchronize(device)
    scratch.zero_()
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in zip(events[:-1], events[1:], strict=True)]


def median_sum(rounds: Sequence[Sequence[float]]) -> float:
    """The median over rounds of all steps together."""
    return statistics.median(sum(steps) for steps in rounds)


def median_max(rounds: Sequence[Sequence[float]]) -> float:
    """The median over rounds of the slowest step."""
    return statistics.median(max(steps) for steps in rounds)


def deviations(makers: Makers, expected: Tensors) -> dict[str, dict[str, float] | str]:
    """For everyone, the relative error of out, dq, dk and dv, or why there is none."""
    found: dict[str, dict[str, float] | str] = {}
    for name, make in makers.items():
        try:
            contender = make()
            for step in (*contender.forward, *contender.backward):
                step()
            pairs = zip(NAMES, contender.results(), expected, strict=True)
            found[name] = {label: relative(got, ideal) for label, got, ideal in pairs}
        except Exception as error:  # whatever it is, the others go on
            found[name] = described(error)
    return found


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, Euclidean.

    Raises:
        ValueError: shapes differ, or `got` is not finite.
    """
    if got.shape != expected.shape:
        raise ValueError(f"got shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not bool(torch.isfinite(got).all()):
        raise ValueError("the results are not finite")
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def described(error: Exception) -> str:
    """The error in words."""
    return f"{type(error).__name__}: {error}".strip()


def brief(text: str | None, width: int = 60) -> str:
    """The beginning of the first line, for tables."""
    line = (text or "").splitlines()[0] if text else ""
    return line if len(line) <= width else line[: width - 3] + "..."
