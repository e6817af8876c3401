"""What the wheel and the sdist hold and say of themselves; importing seqpar imports nothing optional."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import seqpar
from seqpar import requires

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
def about(wheel):
    """The metadata of the wheel."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    return message_from_bytes(archive.read(name))


def test_the_wheel_installs_two_names(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"seqpar", "seqpar_kernels"}
    for needed in ("seqpar/py.typed", "seqpar_kernels/py.typed", "seqpar/testing/oracle.py"):
        assert needed in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_sdist_holds_tests_and_docs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("seqpar", "kernels", "tests", "docs", "scripts"):
        here = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert here <= names, here - names


def test_twine_finds_nothing_wrong(wheel, sdist):
    command = [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_of_the_readme_work_outside_of_the_repository(about):
    text = about.get_payload(decode=True).decode()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)|src=[\"']([^\"']+)", text)
    links = re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)|href=[\"']([^\"']+)", text)
    assert links
    for kind, found in (("raw", pictures), ("blob", links)):
        base = f"https://github.com/seqpar/seqpar/{kind}/main/"
        for target in map("".join, found):
            assert target.startswith(("https://", "#")), target
            if target.startswith("https://github.com/seqpar/seqpar/"):
                assert target.startswith(base), target
                assert (ROOT / target.removeprefix(base).partition("#")[0]).exists(), target


def test_code_of_the_readme_is_as_it_was(about):
    text = about.get_payload(decode=True).decode()
    blocks = [re.findall(r"^```.*?^```", t, re.DOTALL | re.MULTILINE) for t in (text, _readme())]
    assert blocks[0] == blocks[1]


def _readme():
    return (ROOT / "README.md").read_text("utf-8")


def test_the_version_is_said_once(about):
    assert about["Version"] == seqpar.__version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    says = re.compile(rf"[\"']{re.escape(seqpar.__version__)}[\"']")
    sources = [*(ROOT / "seqpar").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    found = [path.name for path in sources if says.search(path.read_text("utf-8"))]
    assert found == ["version.py"]
    assert f"\n## {seqpar.__version__} " in (ROOT / "docs" / "CHANGELOG.md").read_text("utf-8")


def test_every_range_is_one_that_can_be_compared(about):
    for line in about.get_all("Requires-Dist"):
        bounds = requires.REQUIREMENT.match(line)[2].strip()
        if (
            "extra == 'flash-attn-4'" in line
        ):  # of which there are only betas, and which nothing compares
            continue
        assert re.fullmatch(r"(?:(?:>=|<)\d+(?:\.\d+)*(?:,|$))+", bounds), line


def test_the_metadata_says_what_and_where(about):
    urls = dict(line.split(", ") for line in about.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Changelog", "Issues"} <= urls.keys()
    assert "ring attention" in about["Keywords"]
    pythons = [c for c in about.get_all("Classifier") if re.search(r"Python :: 3\.\d+", c)]
    assert about["Requires-Python"] == ">=" + pythons[0].rpartition(" ")[2]


def test_importing_the_wheel_imports_nothing_optional_and_prints_nothing(wheel):
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import seqpar, seqpar.tensor_parallel; "
        f"assert seqpar.__file__.startswith({str(wheel)!r}), seqpar.__file__; "
        f"found = [m for m in {OPTIONAL} if m in sys.modules]; assert not found, found; "
        "import seqpar.testing; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_the_public_names_exist_and_have_docstrings():
    for name in seqpar.__all__:
        assert getattr(seqpar, name).__doc__, name
