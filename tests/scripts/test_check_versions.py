"""The ends of the declared ranges are what `scripts/upkeep/check_versions.py` installs."""

import sys
import tomllib

import pytest
from check_versions import RANGED, ROOT, constraints, lower_ends, run_tests

from seqpar.integrations.transformers import internals
from seqpar_kernels import torch_internals

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCKED = [
    "torch==2.13.0",
    "transformers==5.24.0  # via seqpar",
    "huggingface-hub==2.4.0",
    "rich==15.0.0",
]


def test_every_package_whose_insides_are_used_has_a_range_that_starts_and_ends():
    lows = lower_ends(PROJECT)
    assert set(lows) == set(RANGED)
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [*PROJECT["project"]["dependencies"], *(line for lines in extras for line in lines)]
    for name in set(RANGED) - {"numpy"}:  # which only tests and Triton's interpreter use
        (line,) = {line for line in wanted if line.startswith(f"{name}>=")}
        assert f">={lows[name]},<" in line


def test_what_errors_call_tested_is_what_is_declared():
    """2.11 to 2.15 is >=2.11,<2.16."""
    declared = "\n".join(
        [
            *PROJECT["project"]["dependencies"],
            *PROJECT["project"]["optional-dependencies"]["transformers"],
        ]
    )
    for package, tested in (("torch", torch_internals.TESTED), ("transformers", internals.TESTED)):
        oldest, newest = tested.split(" to ")
        major, minor = newest.split(".")
        assert f"{package}>={oldest},<{major}.{int(minor) + 1}" in declared


def test_a_range_without_a_lower_end_is_an_error():
    project = {"dependencies": ["torch>=2.11"], "optional-dependencies": {}}
    with pytest.raises(ValueError, match=r"no lower end for .*transformers"):
        lower_ends({"project": project})


def test_the_oldest_set_is_the_lower_ends_and_the_newest_is_free():
    lows = lower_ends(PROJECT)
    assert f"torch=={lows['torch']}" in constraints("oldest", lows, LOCKED)
    assert len(constraints("oldest", lows, LOCKED)) == len(RANGED)
    assert constraints("newest", lows, LOCKED) == []


def test_the_oldest_transformers_come_with_what_is_locked_otherwise():
    held = constraints("oldest-transformers", {"transformers": "5.17"}, LOCKED)
    assert held == ["torch==2.13.0", "rich==15.0.0", "transformers==5.17"]
    assert constraints("deepspeed", {}, LOCKED) == LOCKED


def test_torchtitan_comes_with_what_is_locked_but_for_what_it_holds_back():
    held = constraints("torchtitan", {}, [*LOCKED, "datasets==5.2.0"])
    assert held == [x for x in LOCKED if not x.startswith("huggingface-hub")]


def test_what_passed_and_failed_is_counted(tmp_path, capsys):
    (tmp_path / "test_two.py").write_text("def test_a(): pass\n\ndef test_b(): assert False\n")
    found = run_tests(sys.executable, [f"{tmp_path}/test_two.py"], workers=1)
    counts = {kind: found[kind] for kind in ("passed", "failed", "skipped", "exit")}
    assert counts == {"passed": 1, "failed": 1, "skipped": 0, "exit": 1}
    assert [name.rpartition("::")[2] for name in found["failures"]] == ["test_b"]
    assert "1 failed, 1 passed" in capsys.readouterr().out
