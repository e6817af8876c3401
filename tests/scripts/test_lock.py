"""The lock pins every package that setup.sh installs, within all ranges that are known here.

Whether PyPI has these versions for each platform needs the network: `scripts/upkeep/lock.py --check`.
"""

import os
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from itertools import product

import pytest
from lock import HELD, LOCK, PYTHONS, ROOT, recorded_torch_requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

parsed = cache(Requirement)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
MACOS = {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix"}
MACHINES = {
    "linux-x86_64": LINUX | {"platform_machine": "x86_64"},
    "linux-aarch64": LINUX | {"platform_machine": "aarch64"},
    "macos-arm64": MACOS | {"platform_machine": "arm64"},
}


def pins(machine):
    """The one version of each package that the lock has for a machine, by name."""
    lines = [line.partition("#")[0] for line in LOCK.read_text("utf-8").splitlines()]
    pinned = [Requirement(line) for line in lines if line]
    here = [r for r in pinned if r.marker is None or r.marker.evaluate(machine)]
    assert len(here) == len({r.name for r in here})
    return {r.name: str(r.specifier).removeprefix("==") for r in here}


@cache
def required_by(name, pin):
    """What a package requires, extras included, as far as it is known on this machine."""
    if name == "seqpar":
        extras = PROJECT["project"]["optional-dependencies"]
        return [
            *PROJECT["build-system"]["requires"],
            *PROJECT["project"]["dependencies"],
            *(with_extra(line, extra) for extra, lines in extras.items() for line in lines),
        ]
    if name == "torch":  # the build here may be one for CPUs, which asks for less
        return recorded_torch_requires()
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    return (found.requires or []) if found.version == pin else []


def with_extra(line, extra):
    requirement, _, marker = line.partition(";")
    condition = f"extra == '{extra}'"
    return f"{requirement}; ({marker}) and {condition}" if marker else f"{line}; {condition}"


def requirements(machine, pinned):
    """Pairs of a package and a requirement of it, from seqpar[dev] on, direct and indirect."""
    waiting, seen = [Requirement("seqpar[dev]")], set()
    while waiting:
        parent = waiting.pop()
        name = canonicalize_name(parent.name)
        for line in required_by(name, pinned.get(name)):
            child = parsed(line)
            environments = [machine | {"extra": extra} for extra in {"", *parent.extras}]
            if child.marker and not any(map(child.marker.evaluate, environments)):
                continue
            if (name, line) not in seen:
                seen.add((name, line))
                waiting.append(child)
                yield name, child


@pytest.mark.parametrize(("machine", "python"), list(product(MACHINES, [PYTHONS[0], PYTHONS[-1]])))
def test_every_requirement_has_a_pin_in_its_range(machine, python):
    here = MACHINES[machine] | {"python_version": python, "python_full_version": f"{python}.0"}
    pinned = pins(here)
    found = list(requirements(here, pinned))
    assert {"torch", "transformers", "hatchling", "filelock"} <= {child.name for _, child in found}
    for name, child in found:
        if child.name == "seqpar":
            continue
        pin = pinned.get(canonicalize_name(child.name))
        assert pin, f"{name} requires {child}, which scripts/lock.txt does not pin"
        assert child.specifier.contains(pin), f"{name} requires {child}, pinned is {pin}"


def test_the_lock_was_made_anew_when_a_held_version_changed():
    assert HELD.items() <= pins({}).items()


def test_without_a_network_one_sentence_is_said():
    closed = "http://127.0.0.1:1"
    proxies = {
        "PIP_DEFAULT_TIMEOUT": "1",
        "https_proxy": closed,
        "HTTPS_PROXY": closed,
        "no_proxy": "",
        "NO_PROXY": "",
    }
    command = [sys.executable, ROOT / "scripts" / "upkeep" / "lock.py", "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | proxies, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "the lock is resolved from PyPI, so it needs a network; pip said:"
    )
    assert done.stderr.count("\n") == 1
