"""`Tree`: a copy of the checkout in which a file is changed, and tests run in forked processes."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Literal

COPIED = ("seqpar", "kernels", "tests", "scripts", "docs", "pyproject.toml", "README.md")
# Loaded once, before processes are forked, since each would take seconds to import them.
PRELOADED = ("torch", "numpy", "pytest", "hypothesis", "transformers.modeling_utils")

Outcome = Literal["pass", "fail", "take too long"]


class Tree:
    """A copy of a checkout, removed at the end. Its process must not have imported the package.

    Args:
        root: the checkout.
    """

    def __init__(self, root: Path) -> None:
        self._root, self._folder = root, tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        for name in COPIED:
            if (root / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
                shutil.copytree(root / name, self.path / name, ignore=ignored)
            else:
                shutil.copy(root / name, self.path / name)
        paths = [str(self.path), str(self.path / "kernels")]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["CI"] = "true"  # the same examples every time
        os.environ.setdefault(
            "TRITON_INTERPRET", "1"
        )  # read when triton is imported, as by transformers
        os.chdir(self.path)
        sys.path[:0] = paths
        for name in PRELOADED:
            importlib.import_module(name)
        self._times = count(int(time.time()))

    def write(self, file: Path, text: str) -> None:
        """Changes a file."""
        (self.path / file).write_text(text)
        # Python tells compiled files that are out of date by size and second.
        second = next(self._times)
        os.utime(self.path / file, (second, second))

    def restore(self, file: Path) -> None:
        """Puts a file back as it was."""
        self.write(file, (self._root / file).read_text())

    def outcome(self, tests: Sequence[str], limit: float) -> Outcome:
        """What becomes of the tests within so many seconds."""
        child = os.fork()
        if child == 0:
            _test(tests)
        deadline = time.monotonic() + limit
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        with suppress(ProcessLookupError):  # else there are processes that a test has started
            os.killpg(child, signal.SIGKILL)
        if not done:
            os.waitpid(child, 0)
            return "take too long"
        return "fail" if os.waitstatus_to_exitcode(status) else "pass"


def _test(tests: Sequence[str]) -> None:
    """Runs tests in a process of its own, until one fails."""
    code = 70
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        import pytest

        # Plugins are imported already, of which pytest would warn.
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
        ]
        code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)
