"""Pins every package that setup.sh installs, in scripts/lock.txt.

The pins are constraints: pip installs what torch's build asks for, at these versions, so that a CPU
build brings no CUDA packages. --check resolves them anew from PyPI, for other platforms.

Example: python scripts/upkeep/lock.py --check
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "scripts" / "lock.txt"
# The versions that the tests ran on; torch 2.13.0 has a small CPU build. The rest is the newest.
HELD = {"torch": "2.13.0", "transformers": "5.24.0"}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin")
# Neither a local folder of wheels nor another index is looked at.
KEPT = {"PIP_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_PROXY", "UV_CACHE_DIR"}
PYPI_ALONE = {
    k: v for k, v in os.environ.items() if k in KEPT or (k[:3] != "UV_" and k[:4] != "PIP_")
}
PYPI_ALONE |= {"PIP_CONFIG_FILE": os.devnull, "UV_PYTHON_DOWNLOADS": "never"}
PYPI_ALONE["MACOSX_DEPLOYMENT_TARGET"] = "14.0"  # as of torch's wheels; uv takes 13 unless told
TORCH_REQUIRES = "# torch for Linux requires "


def main() -> None:
    """Writes the pins unless asked to check only; checks them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, resolve what is there")
    required = torch_requires()
    if not parser.parse_args().check:
        LOCK.write_text(locked(required), "utf-8")
    if recorded_torch_requires() != required:
        sys.exit(
            f"{LOCK} records other requirements of torch than PyPI; run scripts/upkeep/lock.py"
        )
    with ThreadPoolExecutor(4) as pool:
        for line in pool.map(lambda machine: resolved(*machine), product(PLATFORMS, PYTHONS)):
            print(line)


def locked(required: list[str]) -> str:
    """The text of the lock: what torch requires, then the pins for any platform."""
    held = "\n".join(f"{name}=={version}" for name, version in HELD.items())
    newest = ("--universal", f"--python-version={PYTHONS[0]}", "--annotation-style=line")
    done = uv(*newest, "--constraint=-", text=held)
    if done.returncode:
        sys.exit(f"no set of versions fits pyproject.toml and {HELD}:\n{done.stderr}")
    header = ["# Made by scripts/upkeep/lock.py, for pip's --constraint."]
    header += [TORCH_REQUIRES + requirement for requirement in required]
    return "\n".join(header) + "\n" + done.stdout


def resolved(platform: str, python: str) -> str:
    """Says how many packages such a machine would install, all of them pinned and as wheels."""
    machine = ("--only-binary=:all:", f"--python-platform={platform}", f"--python-version={python}")
    done = uv(*machine, "--no-annotate", f"--constraint={LOCK}")
    if done.returncode:
        sys.exit(f"{LOCK} does not resolve for {platform}, Python {python}:\n{done.stderr}")
    chosen = set(done.stdout.split())
    free = chosen - set(re.findall(r"^\w\S*", LOCK.read_text("utf-8"), re.MULTILINE))
    if free:
        sys.exit(
            f"{LOCK} has no pin of {sorted(free)} ({platform}, {python}); run scripts/upkeep/lock.py"
        )
    return f"{platform}, Python {python}: {len(chosen)} packages"


def uv(*options: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Resolves the development requirements from PyPI alone, whatever pip and uv are set to."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra=dev"]
    command += ["--quiet", "--no-header", "--no-config", *options]
    return subprocess.run(
        command, input=text, env=PYPI_ALONE, cwd=ROOT, capture_output=True, text=True, check=False
    )


def torch_requires() -> list[str]:
    """What PyPI's CUDA build of torch requires, extras apart: metadata that a CPU build lacks."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report=-"]
    command += ["--no-deps", "--ignore-installed", "--only-binary=:all:", "--target=unused"]
    command += ["--platform=manylinux_2_28_x86_64", "--python-version=3.12"]
    command += [f"torch=={HELD['torch']}"]
    done = subprocess.run(command, env=PYPI_ALONE, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        sys.exit(
            f"the lock is resolved from PyPI, so it needs a network; pip said: {' '.join(said)}"
        )
    (torch,) = json.loads(done.stdout)["install"]
    return [line for line in torch["metadata"]["requires_dist"] if "extra ==" not in line]


def recorded_torch_requires() -> list[str]:
    """What the lock says that PyPI's CUDA build of torch requires."""
    lines = LOCK.read_text("utf-8").splitlines()
    return [line.removeprefix(TORCH_REQUIRES) for line in lines if line.startswith(TORCH_REQUIRES)]


if __name__ == "__main__":
    main()
