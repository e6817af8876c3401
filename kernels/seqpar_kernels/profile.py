"""`Profile`: which implementations were fastest on a device, by measurement.

One ships for each device family that was measured. `seqpar doctor --measure` makes one of the device at hand,
which comes first. Both are read once in a process, and nothing is measured while a program runs.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = "SEQPAR_PROFILES"  # in the environment: where the user's own profiles are
WINDOW_COUNTS = 2.0  # a window is as far from none as four documents from one
_SHIPPED = Path(__file__).with_name("profiles")


class Kind(NamedTuple):
    """A kind of attention: what decides which implementation is fastest.

    Args:
        bits: of a number: 16 is bfloat16 and float16.
        width: of a head.
        length: tokens that are attended at once; 0 stands for many.
        documents: packed in them.
        windowed: whether a sliding window hides keys.
    """

    bits: int
    width: int
    length: int
    documents: int
    windowed: bool

    def distance(self, other: Kind) -> float:
        """How far apart they are, in factors of two; `inf` for numbers of another size."""
        if self.bits != other.bits:
            return math.inf
        pairs = zip(self[1:4], other[1:4], strict=True)
        factors = sum(abs(math.log2(a / b)) for a, b in pairs if a and b)
        return factors + WINDOW_COUNTS * (self.windowed != other.windowed)


@dataclass(frozen=True)
class Problem:
    """A kind of attention and the seconds that implementations took for it, forward and backward together.

    Args:
        wrong: implementations whose results were not those of the reference, or that failed.
    """

    kind: Kind
    seconds: dict[str, float]
    wrong: tuple[str, ...] = ()

    @property
    def fastest(self) -> tuple[str, ...]:
        """Implementations by the time they took."""
        return tuple(sorted(self.seconds, key=lambda name: self.seconds[name]))


@dataclass(frozen=True)
class Profile:
    """The problems that implementations were timed on, on one device.

    Args:
        device: its name, as the vendor has it.
        capability: of a CUDA device.
        how: versions, the date and the command.
    """

    device: str
    capability: tuple[int, int] | None
    how: str
    problems: tuple[Problem, ...]

    def nearest(self, kind: Kind) -> Problem | None:
        """The problem that is most like this one; `None` where nothing is."""
        # Of two that are as near, the longer: more is lost there.
        like = (p for p in self.problems if not math.isinf(p.kind.distance(kind)))
        return min(like, key=lambda p: (p.kind.distance(kind), -p.kind.length), default=None)

    def write(self, path: Path) -> None:
        """Writes it as JSON, one problem a line."""
        head = {"device": self.device, "capability": self.capability, "how": self.how}
        rows = (
            json.dumps(
                {**p.kind._asdict(), "seconds": p.seconds} | ({"wrong": p.wrong} if p.wrong else {})
            )
            for p in self.problems
        )
        text = (
            json.dumps(head, indent=1)[:-2]
            + ',\n "problems": [\n  '
            + ",\n  ".join(rows)
            + "\n ]\n}\n"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")  # or a program that starts now would read half of it
        part.write_text(text)
        part.replace(path)

    @staticmethod
    def read(path: Path) -> Profile:
        """Reads what `write` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            found = json.loads(path.read_text())
            problems = []
            for row in found["problems"]:
                seconds = {str(name): float(x) for name, x in row.pop("seconds").items()}
                wrong = tuple(map(str, row.pop("wrong", ())))
                problems.append(Problem(Kind(**row), seconds, wrong))
            capability = found["capability"] and tuple(found["capability"])
            return Profile(found["device"], capability, found["how"], tuple(problems))
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is no profile of a device: {error!r}; make it anew with seqpar doctor "
                "--measure, or delete it"
            ) from error


def profile_of(device: torch.device) -> Profile | None:
    """The profile of a device: the user's own, or that of its family; `None` where nothing was measured."""
    if _folder().is_dir() and (found := _own(device_name(device))) is not None:
        return found
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return _shipped().get(torch.cuda.get_device_capability(device))


def device_name(device: torch.device) -> str:
    """The name of a device, by which its profile is found."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}"


def path_of(name: str, folder: Path | None = None) -> Path:
    """Where the user's profile of a device of this name is, by default in the folder that is looked into."""
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    return (folder or _folder()) / f"{slug}.json"


def forget() -> None:
    """Has files be read anew, for tests; what was chosen by them is remembered elsewhere too."""
    _own.cache_clear()
    _shipped.cache_clear()


def _folder() -> Path:
    named = os.environ.get(FOLDER)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "seqpar"


@cache
def _own(name: str) -> Profile | None:
    path = path_of(name)
    return Profile.read(path) if path.exists() else None


@cache
def _shipped() -> dict[tuple[int, int], Profile]:
    profiles = map(Profile.read, sorted(_SHIPPED.glob("*.json")))
    return {p.capability: p for p in profiles if p.capability is not None}
