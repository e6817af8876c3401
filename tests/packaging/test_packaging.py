"""The wheel holds two packages and nothing else; importing seqpar imports nothing optional."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = [
    "triton",
    "flash_attn",
    "transformers",
    "matplotlib",
    "hypothesis",
    "rich",
    "numpy.testing",
]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_installs_two_names(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"seqpar", "seqpar_kernels"}
    for needed in ("seqpar/py.typed", "seqpar_kernels/py.typed", "seqpar/testing/oracle.py"):
        assert needed in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_importing_the_wheel_imports_nothing_optional_and_prints_nothing(wheel):
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import seqpar, seqpar.tensor_parallel; "
        f"assert seqpar.__file__.startswith({str(wheel)!r}), seqpar.__file__; "
        f"found = [m for m in {OPTIONAL} if m in sys.modules]; assert not found, found"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_the_public_names_exist_and_have_docstrings():
    import seqpar

    for name in seqpar.__all__:
        assert getattr(seqpar, name).__doc__, name
