"""`TestsOf`: which tests run a line, the quick ones first, from what pytest-cov and JUnit reports say."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from coverage import CoverageData


class TestsOf:
    """The tests that run a line of a file.

    Args:
        data: a `.coverage` file with a context for each test, from `pytest --cov-context=test`.
        report: of `pytest --junitxml`, of the same run: how long each test took.
    """

    def __init__(self, data: Path, report: Path) -> None:
        self._data = CoverageData(str(data))
        self._data.read()
        self._seconds: dict[str, float] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            file = case.attrib["classname"].replace(".", "/") + ".py"
            self._seconds[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])

    def seconds(self, test: str) -> float:
        """How long a test took."""
        return self._seconds[test]

    @cache  # noqa: B019 (there is one, as long as the program)
    def _by_line(self, file: str) -> dict[int, list[str]]:
        measured = [f for f in self._data.measured_files() if f.endswith(f"/{file}")]
        found: dict[int, set[str]] = defaultdict(set)
        for name in measured:
            for line, contexts in self._data.contexts_by_lineno(name).items():
                tests = {re.sub(r"\|\w+$", "", context) for context in contexts}
                found[line] |= {test for test in tests if test in self._seconds}
        return {line: sorted(tests, key=self._seconds.__getitem__) for line, tests in found.items()}

    def of(self, file: Path, line: int) -> list[str]:
        """The tests that run a line, the quickest first; not those whose processes run it."""
        return self._by_line(str(file)).get(line, [])
