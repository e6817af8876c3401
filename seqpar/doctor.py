"""What this machine has, which implementation computes attention on it and why, and a self-check.

Everything is returned as data and as lines of plain text; printing is `seqpar.cli`'s. Optional
packages are looked up, never imported.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch

from seqpar import __version__
from seqpar.comm import simulate
from seqpar.strategies import STRATEGIES
from seqpar.testing import Case, Errors, ProcessWorld, errors_on_rank
from seqpar_kernels import (
    DTYPES,
    IMPLEMENTATIONS,
    TERMS,
    Ranges,
    Request,
    choose,
    preference,
    refusal,
)
from seqpar_kernels.profile import profile_of

PACKAGES = ("torch", "triton", "flash_attn")
WIDTH = {"d": 64, "vd": 64}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    # Those that join rows once ask nothing of an implementation.
    **{kind.words: {"terms": (kind,)} for kind in TERMS if not (kind.joins or kind.hides)},
    "documents": {"terms": (Ranges,), "documents": 32},
    "head dim 512": {"d": 512, "vd": 512},
}
CHOSEN = "the first in order of preference that refuses nothing"
CHECKED = Case(length=33, hq=4, hkv=2, kind="zigzag")  # two ranks hold 17 and 16 rows
CHECKED_DTYPES = (torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """Which implementation serves a kind of call on a kind of device; for every other, why not."""

    device: str
    dtype: str
    feature: str
    implementation: str
    why: str
    why_not: dict[str, str]


@dataclass(frozen=True)
class Machine:
    """Versions by package (`None`: not installed), devices, and what is chosen on them.

    Args:
        profiles: by kind of device, what the order of preference was measured on, `None` if it was not.
    """

    versions: dict[str, str | None]
    devices: list[dict[str, Any]]
    preference: dict[str, list[str]]
    profiles: dict[str, str | None]
    choices: list[Choice]


@dataclass(frozen=True)
class Check:
    """Two ranks against the oracle.

    `share` is the largest error over what is allowed for it, `None` if the check failed.
    """

    world: str
    strategy: str
    dtype: str
    share: float | None
    seconds: float
    failures: list[str]


def examine() -> Machine:
    """What is here. Starts nothing."""
    found = devices()
    kinds = list(dict.fromkeys(device["kind"] for device in found))
    return Machine(
        versions(),
        found,
        {kind: list(preference(_plain(torch.device(kind)))) for kind in kinds},
        {kind: _measured(torch.device(kind)) for kind in kinds},
        [choice for kind in kinds for choice in choices(torch.device(kind))],
    )


def versions() -> dict[str, str | None]:
    """The version of each package that matters, by the metadata of what is installed."""
    installed: dict[str, str | None] = {"python": platform.python_version(), "seqpar": __version__}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def devices() -> list[dict[str, Any]]:
    """The CPU and every GPU."""
    found: list[dict[str, Any]] = [
        {"kind": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        found.append(
            {
                "kind": "cuda", "name": gpu.name, "index": index, "capability": capability,
                "memory_bytes": gpu.total_memory,
            }
        )  # fmt: skip
    return found


def choices(device: torch.device) -> Iterator[Choice]:
    """What is chosen on a kind of device, for every dtype and feature."""
    for dtype in DTYPES:
        for feature, asked in FEATURES.items():
            request = Request(device, dtype, **(WIDTH | asked))
            chosen = choose(request)
            why_not: dict[str, str] = {
                name: refusal(name, request) or _passed_over(name, chosen, request)
                for name in IMPLEMENTATIONS
                if name != chosen
            }
            yield Choice(device.type, _name(dtype), feature, chosen, CHOSEN, why_not)


def selfcheck() -> Iterator[Check]:
    """Both strategies on two ranks in every world there is here, in float64 and bfloat16."""
    yield from _checks("threads on cpu", lambda *call: simulate(2, errors_on_rank, *call))
    if torch.cuda.is_available():
        on_cuda = partial(errors_on_rank, device="cuda")
        yield from _checks("threads on cuda", lambda *call: simulate(2, on_cuda, *call))
    with closing(_Processes()) as processes:
        yield from _checks("processes on cpu (gloo)", processes.errors)


def described(machine: Machine) -> Iterator[str]:
    """The machine in lines of text."""
    yield "Versions"
    for name, version in machine.versions.items():
        yield f"  {name:<12}{version or 'not installed'}"
    yield ""
    yield "Devices"
    for device in machine.devices:
        if device["kind"] == "cpu":
            yield f"  {'cpu':<12}{device['name']}, torch uses {device['threads']} threads"
        else:
            size = f"{device['memory_bytes'] / 2**30:.0f} GiB"
            name, capability = device["name"], device["capability"]
            yield f"  cuda:{device['index']:<7}{name}, capability {capability}, {size}"
    for kind, names in machine.preference.items():
        here = [choice for choice in machine.choices if choice.device == kind]
        yield ""
        yield f"What computes attention on {kind}: {CHOSEN} ({', '.join(names)})"
        measured = machine.profiles[kind]
        yield f"  {f'By a measurement on {measured}' if measured else 'Not measured on this device'}"
        yield from _table(here)
        yield "  Why not another:"
        yield from _reasons(here)


def told(check: Check) -> str:
    """The check in a line of text, with one more for each failure."""
    share = "" if check.share is None else f", largest error {check.share:.2g} of what is allowed"
    line = f"{check.world:<24}{check.strategy:<22}{check.dtype:<10}"
    if not check.failures:
        return f"{line}ok{share}, {check.seconds:.1f} s"
    return "\n    ".join([f"{line}FAILED", *check.failures])


def _measured(device: torch.device) -> str | None:
    profile = profile_of(device)
    return None if profile is None else f"{profile.device} ({profile.how})"


def _plain(device: torch.device) -> Request:
    return Request(device, torch.bfloat16, WIDTH["d"], WIDTH["vd"])


def _passed_over(name: str, chosen: str, request: Request) -> str:
    if name in preference(request):
        return f"can, but {chosen} comes first"
    return f"can, but is used on {request.device.type} only where asked for by name"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(here: list[Choice]) -> Iterator[str]:
    """A row for each dtype, a column for each feature."""
    yield "  " + "".join(f"{title:<14}" for title in ("", *FEATURES)).rstrip()
    for dtype in dict.fromkeys(choice.dtype for choice in here):
        names = [choice.implementation for choice in here if choice.dtype == dtype]
        yield "  " + "".join(f"{cell:<14}" for cell in (dtype, *names)).rstrip()


def _reasons(here: list[Choice]) -> Iterator[str]:
    """Every reason once, with the calls it holds for."""
    calls: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for choice in here:
        for name, reason in choice.why_not.items():
            calls.setdefault((name, reason), []).append((choice.dtype, choice.feature))
    for name in IMPLEMENTATIONS:
        for (other, reason), held in calls.items():
            if other == name:
                where = "always" if len(held) == len(here) else "; ".join(_summary(held))
                yield f"    {name:<12}{reason} [{where}]"


def _summary(held: Iterable[tuple[str, str]]) -> Iterator[str]:
    """(dtype, feature) pairs as few phrases: features with the same dtypes share one."""
    by_feature: dict[str, list[str]] = {}
    for dtype, feature in held:
        by_feature.setdefault(feature, []).append(dtype)
    by_dtypes: dict[tuple[str, ...], list[str]] = {}
    for feature, dtypes in by_feature.items():
        by_dtypes.setdefault(tuple(dtypes), []).append(feature)
    for types, features in by_dtypes.items():
        what = "" if len(features) == len(FEATURES) else ", ".join(features)
        when = "" if len(types) == len(DTYPES) else ", ".join(types)
        yield " in ".join(part for part in (what, when) if part)


def _checks(world: str, errors_by_rank: Callable[[Case, str], list[Errors]]) -> Iterator[Check]:
    for strategy in STRATEGIES:
        for dtype in CHECKED_DTYPES:
            start, share = time.perf_counter(), None
            try:
                errors = errors_by_rank(replace(CHECKED, dtype=dtype), strategy)
            except Exception as error:  # whatever it is, it is the answer
                failures = [f"{type(error).__name__}: {error}"]
            else:
                failures = [
                    f"rank {r}: {text}" for r, e in enumerate(errors) for text in e.failures
                ]
                if not failures:
                    share = max(e.found[n] / e.allowed[n] for e in errors for n in e.found)
            seconds = time.perf_counter() - start
            yield Check(world, strategy, _name(dtype), share, seconds, failures)


class _Processes:
    """Two processes, started when they are first needed and again after a failure."""

    def __init__(self) -> None:
        self._world: ProcessWorld | None = None

    def errors(self, case: Case, strategy: str) -> list[Errors]:
        if self._world is None or not self._world.is_alive:
            self._world = ProcessWorld(2)
        return self._world.run(errors_on_rank, case, strategy)

    def close(self) -> None:
        if self._world is not None and self._world.is_alive:
            self._world.close()
