"""What `seqpar bench` finds out: memory and results of each contender, then times in alternating rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from seqpar import Group
from seqpar.commands.load import Load
from seqpar.commands.peers import PEERS
from seqpar.commands.steps import (
    Setting,
    Taken,
    one_device_memory,
    one_device_step,
    rank_errors,
    rank_memory,
    rank_step,
    save_expected,
)
from seqpar.testing import ProcessWorld, WorldError

ONE_DEVICE = "one device"
PATIENCE_SECONDS = 3600.0  # for a step, which is as long as the sequence makes it
# Of the norm of a result. What is rounded to a type is off by a few steps of it; a wrong gradient by about 1.
ALLOWED = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Row:
    """One contender: ratios are to one process, bytes sent are of all ranks, the peak of the worst.

    Args:
        quartiles: of the ratios of rounds, the lower and the upper.
        error: the largest of its results against one device in float32, as a share of their norm.
    """

    name: str
    layout: str
    median_seconds: float
    ratio: float
    quartiles: tuple[float, float]
    ratio_of_best: float
    sent_bytes: int | None
    derived_bytes: int | None
    peak_bytes: int | None
    error: float
    seconds: list[float]


@dataclass(frozen=True)
class Outcome:
    """What a contest found.

    Args:
        refused: by name of a contender that was not timed, why.
        others: the share of the machine's CPUs that other processes used meanwhile, if it can be known.
    """

    rows: list[Row]
    refused: dict[str, str]
    others: float | None


@dataclass(frozen=True)
class _Checked:
    peak_bytes: int | None
    error: float


def contest(
    setting: Setting, ranks: int, threads: int, rounds: int, say: Callable[[str], None]
) -> Outcome:
    """One process first, then every contender of the setting whose results are right.

    Args:
        say: is told what is being done.
    """
    checked: dict[str, _Checked] = {}
    refused: dict[str, str] = {}
    with TemporaryDirectory() as folder, ProcessWorld(1, num_threads=threads) as one:
        path = Path(folder, "expected.pt")
        (peak,) = one.run(one_device_memory, setting, timeout=PATIENCE_SECONDS)
        checked[ONE_DEVICE] = _Checked(peak, 0.0)
        one.run(save_expected, setting, path, timeout=PATIENCE_SECONDS)
        for name in setting.layouts:
            why = _lacks(setting, name, ranks)
            if why is not None:
                refused[name] = why
                continue
            say(f"memory and results of {name}")
            try:
                checked[name] = _check(setting, name, ranks, path)
            except (WorldError, ValueError) as error:
                refused[name] = str(error).strip().splitlines()[-1]
    names = [name for name in setting.layouts if name in checked]
    with ProcessWorld(1, num_threads=threads) as one, ProcessWorld(ranks) as many:
        load, own = Load.now(), _own_seconds(one, many)
        steps = _rounds(setting, names, one, many, rounds, say)
        end = Load.now()
        others = end.others(load, _own_seconds(one, many) - own) if end and load else None
    alone = [taken.seconds for (taken,) in steps[ONE_DEVICE]]
    rows = [_row(name, setting, steps[name], alone, checked[name]) for name in steps]
    return Outcome(rows, refused, others)


def _lacks(setting: Setting, name: str, ranks: int) -> str | None:
    peer = PEERS.get(name)
    return (
        None if peer is None else peer.lacks(setting.length, setting.heads, ranks, setting.causal)
    )


def _check(setting: Setting, name: str, ranks: int, path: Path) -> _Checked:
    """Memory and errors, in processes that did nothing before.

    Raises:
        ValueError: its results are wrong.
        WorldError: it fails.
    """
    with ProcessWorld(ranks) as world:
        peaks = world.run(rank_memory, setting, name, timeout=PATIENCE_SECONDS)
        errors = world.run(rank_errors, setting, name, path, timeout=PATIENCE_SECONDS)
    worst = {what: max(of[what] for of in errors) for what in errors[0]}
    wrong = [
        f"{what} is off by {x:.2g}" for what, x in worst.items() if not x <= ALLOWED[setting.dtype]
    ]
    if wrong:
        raise ValueError(f"WRONG: {', '.join(wrong)} of its norm")
    known = [peak for peak in peaks if peak is not None]
    return _Checked(max(known, default=None), max(worst.values()))


def _rounds(
    setting: Setting,
    names: Sequence[str],
    one: ProcessWorld,
    many: ProcessWorld,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, list[list[Taken]]]:
    """What every rank took in every round, by name."""
    steps: dict[str, list[list[Taken]]] = {name: [] for name in (ONE_DEVICE, *names)}
    for n in range(rounds + 1):
        say(f"round {n} of {rounds}" if n else "a round to warm up")
        taken = {}
        # Each round begins with another, so that nobody always follows the same one.
        for name in [*steps][n % len(steps) :] + [*steps][: n % len(steps)]:
            if name == ONE_DEVICE:
                seconds = one.run(one_device_step, setting, timeout=PATIENCE_SECONDS)
                taken[name] = [Taken(seconds[0])]
            else:
                taken[name] = many.run(rank_step, setting, name, timeout=PATIENCE_SECONDS)
        if n > 0:  # the first round warms up
            for name in steps:
                steps[name].append(taken[name])
    return steps


def _row(
    name: str, setting: Setting, steps: list[list[Taken]], alone: list[float], checked: _Checked
) -> Row:
    seconds = [max(taken.seconds for taken in ranks) for ranks in steps]
    ratios = [a / b for a, b in zip(seconds, alone, strict=True)]
    lower, _, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    last = steps[-1]
    return Row(
        name,
        setting.layouts.get(name, ""),
        statistics.median(seconds),
        statistics.median(ratios),
        (lower, upper),
        min(seconds) / min(alone),
        _sum(taken.sent_bytes for taken in last),
        _sum(taken.derived_bytes for taken in last),
        checked.peak_bytes,
        checked.error,
        seconds,
    )


def _sum(numbers: Any) -> int | None:
    """Their sum, `None` where one is not known."""
    known = list(numbers)
    return None if None in known else sum(known)


def _own_seconds(*worlds: ProcessWorld) -> float:
    """CPU seconds that the processes of worlds, and this one, have used."""
    return time.process_time() + sum(sum(world.run(_cpu_seconds)) for world in worlds)


def _cpu_seconds(_: Group) -> float:
    return time.process_time()
