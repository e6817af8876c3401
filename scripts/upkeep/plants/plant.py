"""`Plant`: a bug, where it goes and which test should notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plant:
    """A bug: in `file`, the one place that reads `old` becomes `new`; `test` should notice."""

    name: str
    file: str
    old: str
    new: str
    test: str = "tests/strategies/test_equivalence.py"
