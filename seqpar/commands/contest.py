"""What `seqpar bench` finds out: P ranks and one process in alternating rounds, then memory afresh."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from seqpar.calls import Volume
from seqpar.commands.steps import (
    Setting,
    one_device_memory,
    one_device_step,
    rank_memory,
    rank_step,
)
from seqpar.testing import ProcessWorld

ONE_DEVICE = "one device"
PATIENCE_SECONDS = 3600.0  # for a step, which is as long as the sequence makes it


@dataclass(frozen=True)
class Row:
    """One contender: ratios are to one process, bytes sent are of all ranks, the peak of the worst."""

    name: str
    layout: str
    median_seconds: float
    ratio: float
    ratio_of_best: float
    sent_bytes: int
    derived_bytes: int
    peak_bytes: int | None
    seconds: list[float]


def contest(
    setting: Setting, ranks: int, threads: int, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    """One process first, then every strategy of the setting.

    Args:
        say: is told what is being done.
    """
    with ProcessWorld(1, num_threads=threads) as one, ProcessWorld(ranks) as many:
        times, volumes = _rounds(setting, one, many, rounds, say)
    say("memory")
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[ONE_DEVICE], strict=True)]
        sent, derived = volumes.get(name, (0, 0))
        rows.append(
            Row(
                name,
                setting.layouts.get(name, ""),
                statistics.median(seconds),
                statistics.median(ratios),
                min(seconds) / min(times[ONE_DEVICE]),
                sent,
                derived,
                _peak(setting, name, ranks, threads),
                seconds,
            )
        )
    return rows


def _rounds(
    setting: Setting,
    one: ProcessWorld,
    many: ProcessWorld,
    rounds: int,
    say: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, tuple[int, int]]]:
    """Seconds of every round by name; bytes sent by strategy, counted and by a dry run."""
    times: dict[str, list[float]] = {name: [] for name in (ONE_DEVICE, *setting.layouts)}
    volumes: dict[str, tuple[int, int]] = {}
    for n in range(rounds + 1):
        say(f"round {n} of {rounds}" if n else "a round to warm up")
        (alone,) = one.run(one_device_step, setting, timeout=PATIENCE_SECONDS)
        seconds = {ONE_DEVICE: alone}
        for strategy in setting.layouts:
            steps = many.run(rank_step, setting, strategy, timeout=PATIENCE_SECONDS)
            seconds[strategy] = max(step[0] for step in steps)
            volumes[strategy] = _bytes(step[1] for step in steps), _bytes(step[2] for step in steps)
        if n > 0:  # the first round warms up
            for name, value in seconds.items():
                times[name].append(value)
    return times, volumes


def _bytes(volumes: Iterable[Volume]) -> int:
    return sum(volume.forward.bytes + volume.backward.bytes for volume in volumes)


def _peak(setting: Setting, name: str, ranks: int, threads: int) -> int | None:
    """The peak of the worst process, in processes that did nothing before."""
    peaks: Sequence[int | None]
    if name == ONE_DEVICE:
        with ProcessWorld(1, num_threads=threads) as world:
            peaks = world.run(one_device_memory, setting, timeout=PATIENCE_SECONDS)
    else:
        with ProcessWorld(ranks) as world:
            peaks = world.run(rank_memory, setting, name, timeout=PATIENCE_SECONDS)
    return max((peak for peak in peaks if peak is not None), default=None)
