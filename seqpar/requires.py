"""What seqpar needs of other packages, and its absence or a wrong version said in one sentence.

Ranges are read from the metadata of the installed seqpar, so that only pyproject.toml says them. Where
there is none, as in a checkout that was never installed, any version will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*\(?([^;()]*)\)?\s*(;?)")


def require(name: str, *, by: str, extra: str | None = None) -> None:
    """Refuses where a package is not there or not of a version within the range.

    Args:
        by: what needs it, as in "seqpar.integrations.transformers".
        extra: the extra of seqpar that installs it.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ImportError: its version is outside of the range.
    """
    supported = next((bounds for each, bounds, _ in _requirements() if each == name), "")
    _check(name, supported, by, extra)


def require_dependencies() -> None:
    """Refuses where what seqpar cannot be imported without is missing or too old.

    A newer one than was tested is let in: what it lacks is named where it is used.

    Raises:
        ModuleNotFoundError, ImportError: as `require`.
    """
    for name, supported, is_always_needed in _requirements():
        if is_always_needed:
            oldest = (bound for bound in supported.split(",") if bound.startswith(">="))
            _check(name, ",".join(oldest), "seqpar")


def is_within(version: str, bounds: str) -> bool:
    """Whether a version is in a range such as ">=2.11,<3", by the numbers it begins with."""
    for bound in filter(None, bounds.split(",")):
        assert re.match(r">=\d|<\d", bound), f"{bounds} must be made of >= and < alone"
        release, end = _release(version), _release(bound.lstrip("<>="))
        length = max(len(release), len(end))
        release, end = (x + (0,) * (length - len(x)) for x in (release, end))
        if not (release >= end if bound.startswith(">=") else release < end):
            return False
    return True


def _check(name: str, supported: str, by: str, extra: str | None = None) -> None:
    needs, command = f"{by} needs {name}{supported}", f"pip install '{name}{supported}'"
    if extra is not None:
        command = f"pip install 'seqpar[{extra}]'"
    if find_spec(name) is None:
        raise ModuleNotFoundError(f"{needs}, which is not installed: {command}", name=name)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:  # importable, but nobody says which it is
        return
    if not is_within(version, supported):
        raise ImportError(f"{needs}, got {name} {version}: {command}", name=name)


def _requirements() -> Iterator[tuple[str, str, bool]]:
    """(name, range, whether it is needed always and everywhere) of what seqpar requires."""
    try:
        lines = metadata.requires("seqpar") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        found = REQUIREMENT.match(line)
        assert found is not None, line
        name, bounds, marker = found.groups()
        # The lower bound first: metadata sorts them by their signs.
        supported = ",".join(sorted(bounds.replace(" ", "").split(","), reverse=True))
        yield name, supported, not marker


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in numbers.group().split(".")) if numbers else ()
