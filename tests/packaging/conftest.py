"""What is built of the package, and a fresh environment in which it alone was installed."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder with the sdist, and with the wheel that was made from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(built):
    (path,) = built.glob("*.tar.gz")
    return path


class Fresh:
    """An environment that holds the wheel and what it requires, and no more.

    What it requires is linked to where the tests found it: torch is large.
    """

    def __init__(self, folder, wheel):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = ["-m", "pip", "--isolated", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([folder / "bin" / "python", *install, wheel], check=True)
        (self._packages,) = folder.glob("lib/python*/site-packages")
        (own,) = metadata.distributions(name="seqpar", path=[str(self._packages)])
        self._link_requirements(own, {"seqpar"})

    def _link_requirements(self, of, seen):
        for requirement in map(Requirement, of.requires or []):
            is_needed = not requirement.marker or requirement.marker.evaluate({"extra": ""})
            if is_needed and requirement.name not in seen:
                seen.add(requirement.name)
                found = metadata.distribution(requirement.name)
                for name in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
                    link = self._packages / name
                    if not link.exists():
                        link.symlink_to(found.locate_file(name))
                self._link_requirements(found, seen)

    def run(self, *command, **env):
        """What a command of the environment, or its Python, says and exits with."""
        kept = {
            name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS") if name in os.environ
        }
        return subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={"PATH": os.defpath} | kept | env,
            timeout=300,
        )


@pytest.fixture(scope="session")
def fresh(tmp_path_factory, wheel):
    return Fresh(tmp_path_factory.mktemp("fresh"), wheel)
