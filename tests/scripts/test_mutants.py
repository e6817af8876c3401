"""Mutants are small, legal changes; a file without a change passes, and one that tests try is noticed."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mutants
from mutating.mutant import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
CODE = '''
def f(x: int, n: int = 3) -> int:
    """The 1 text."""
    if TYPE_CHECKING:
        n = 1
    if x < n and not x:
        raise ValueError(f"{x + 1}")
    g(x)
    total = sum(y for y in range(n) if y % 2 == 0)
    for i in range(True):
        break
    return (x
            + total)
'''
CHANGES = """
f:2: 3 -> (4)
f:6: x < n and not x -> (x < n or not x)
f:6: x < n and not x -> (not (x < n and (not x)))
f:6: x < n -> (x <= n)
f:6: not x -> (x)
f:7: raise ValueError(f"{x + 1}") -> pass
f:8: g(x) -> pass
f:9: y % 2 == 0 -> (not y % 2 == 0)
f:9: y % 2 == 0 -> (y % 2 != 0)
f:9: y % 2 -> (y // 2)
f:9: 2 -> (3)
f:9: 0 -> (1)
f:10: True -> (False)
f:11: break -> continue
f:12: return (x + total) -> return None
f:12: x + total -> (x - total)
"""


def test_what_is_changed(tmp_path):
    path = tmp_path / "f"
    path.write_text(CODE)
    found = mutants_of(path)
    said = {str(m).replace(str(path), "f").replace("  ->  ", " -> ") for m in found}
    assert said == set(CHANGES.strip().splitlines())
    for mutant in found:
        ast.parse(mutant.text)
        assert mutant.text.count("\n") == CODE.count("\n")
        assert mutant.text.splitlines()[:1] == CODE.splitlines()[:1]


def test_every_part_has_files():
    assert all(list(ROOT.glob(pattern)) for pattern in mutants.PARTS.values())


def test_tests_of_the_part_come_first_and_then_those_of_all_files_in_turn():
    took = {"tests/a/a::1": 1.0, "tests/a/a::2": 2.0, "tests/b/b::1": 3.0, "tests/c/c::1": 4.0}
    tests = SimpleNamespace(seconds=took.__getitem__, of=lambda *_: list(took))
    mutant = Mutant(Path("seqpar/c/file.py"), 1, "", "", "")
    assert mutants.chosen(mutant, tests, 8.0) == ["tests/c/c::1", "tests/a/a::1", "tests/b/b::1"]
    assert mutants.chosen(mutant, tests, 0.5) == ["tests/c/c::1"], "at least one"


def test_the_script(tmp_path):
    """From a run of a few tests, as its text says."""
    coverage, report = tmp_path / ".coverage", tmp_path / "report.xml"
    options = [f"--cov={p}" for p in ("seqpar", "seqpar_kernels")]
    options += ["--cov-branch", "--cov-context=test", f"--junitxml={report}", "--cov-report="]
    run(["-m", "pytest", *options, "tests/layout/test_visible.py"], COVERAGE_FILE=str(coverage))
    found = tmp_path / "found.json"
    files = ["--coverage", coverage, "--report", report, "--json", found]
    done = run([mutants.__file__, *files, "--parts", "layout", "--sample", "4", "--jobs", "1"])
    assert re.search(r"\d of 4 lines run in no test", done)
    assert re.search(r"\d changes, \d noticed", done)
    assert found.exists()


def run(command, **environment):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
