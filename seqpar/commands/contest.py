"""What `seqpar bench` finds out: memory and results of each contender, then times in alternating rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
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
                refused[name] = _last_line(error)
    names = [name for name in setting.layouts if name in checked]
    with _Worlds(ranks, threads) as worlds:
        load, own = Load.now(), worlds.own_seconds()
        steps, failed = _rounds(setting, names, worlds, rounds, say)
        end = Load.now()
        others = end.others(load, worlds.own_seconds() - own) if end and load else None
    refused |= failed
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


class _Worlds:
    """One process, and the processes of the ranks, which are made anew where something fails in them."""

    def __init__(self, ranks: int, threads: int) -> None:
        self._ranks = ranks
        self.one, self.many = ProcessWorld(1, num_threads=threads), ProcessWorld(ranks)

    def renew(self) -> None:
        """Makes new processes of the ranks."""
        self.many = ProcessWorld(self._ranks)

    def own_seconds(self) -> float:
        """CPU seconds that these processes, and this one, have used."""
        worlds = self.one, self.many
        return time.process_time() + sum(sum(world.run(_cpu_seconds)) for world in worlds)

    def __enter__(self) -> _Worlds:
        return self

    def __exit__(self, *_: object) -> None:
        for world in (self.one, self.many):
            if world.is_alive:
                world.close()


def _rounds(
    setting: Setting,
    names: Sequence[str],
    worlds: _Worlds,
    rounds: int,
    say: Callable[[str], None],
) -> tuple[dict[str, list[list[Taken]]], dict[str, str]]:
    """(what every rank took in every round, by name; why a contender failed, by name)."""
    steps: dict[str, list[list[Taken]]] = {name: [] for name in (ONE_DEVICE, *names)}
    failed: dict[str, str] = {}
    for n in range(rounds + 1):
        say(f"round {n} of {rounds}" if n else "a round to warm up")
        order = [*steps]
        # In every round another order, so that nobody always follows the same one.
        Random(n).shuffle(order)
        for name in order:
            try:
                taken = _step(setting, name, worlds)
            except WorldError as error:
                failed[name] = _last_line(error)
                del steps[name]
                worlds.renew()
                continue
            if n > 0:  # the first round warms up
                steps[name].append(taken)
    return steps, failed


def _step(setting: Setting, name: str, worlds: _Worlds) -> list[Taken]:
    if name == ONE_DEVICE:
        (seconds,) = worlds.one.run(one_device_step, setting, timeout=PATIENCE_SECONDS)
        return [Taken(seconds)]
    return worlds.many.run(rank_step, setting, name, timeout=PATIENCE_SECONDS)


def _last_line(error: Exception) -> str:
    """What a traceback ends with."""
    return str(error).strip().splitlines()[-1]


def _row(
    name: str, setting: Setting, steps: list[list[Taken]], alone: list[float], checked: _Checked
) -> Row:
    seconds = [max(taken.seconds for taken in ranks) for ranks in steps]
    ratios = [a / b for a, b in zip(seconds, alone, strict=True)]
    lower, upper = quartiles(ratios)
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


def quartiles(numbers: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper one of what was measured, however little that is."""
    if len(numbers) == 1:
        return numbers[0], numbers[0]
    lower, _, upper = statistics.quantiles(numbers, n=4, method="inclusive")
    return lower, upper


def _sum(numbers: Any) -> int | None:
    """Their sum, `None` where one is not known."""
    known = list(numbers)
    return None if None in known else sum(known)


def _cpu_seconds(_: Group) -> float:
    return time.process_time()
