"""An installed wheel is whole: nothing is needed of the repository, and what is missing is named."""

import re
from pathlib import Path

import pytest

EXAMPLE = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text("utf-8"), re.DOTALL
)[0]
NOT_THERE = ["beartype", "hypothesis", "matplotlib", "numpy", "peft", "rich", "transformers"]
DISAGREE = """
from seqpar import Layout, Mask, Plan, attention, contiguous
from seqpar.testing import ProcessWorld
import torch

def differ(group):
    q = torch.zeros(1, 4, 1, 8)
    attention(q, q, q, Plan(group, contiguous(8, 2), Mask(causal=group.rank == 0)))

if __name__ == "__main__":
    with ProcessWorld(2) as world:
        world.run(differ)
"""


def test_the_environment_holds_nothing_optional(fresh):
    code = f"from importlib.util import find_spec; print([m for m in {NOT_THERE} if find_spec(m)])"
    assert fresh.run("python", "-c", code).stdout == "[]\n"


def test_the_readmes_first_example_runs(fresh):
    done = fresh.run("python", "-c", EXAMPLE)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.removeprefix("largest difference:")) < 1e-12


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["doctor"], "largest error"),
        (
            ["check", "--ranks", "2", "--strategy", "mesh", "--dtype", "float64"],
            "P=2: 63 cases, 0 ",
        ),
        (["bench", "--length", "65", "--rounds", "1", "--dtype", "float32"], "ulysses  "),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_command_needs_no_other_package(fresh, command, says):
    done = fresh.run("seqpar", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout


def test_ranks_that_disagree_are_told_so_without_numpy(fresh):
    path = fresh.folder / "disagree.py"
    path.write_text(DISAGREE)
    done = fresh.run("python", path)
    assert "DesyncError" in done.stderr
    assert "mask" in done.stderr


NEEDS_TRANSFORMERS = (
    r"transformers>=[\d.,<]+, which is not installed: pip install 'seqpar\[transformers\]'"
)


@pytest.mark.parametrize(
    ("code", "env", "says"),
    [
        (
            "import seqpar.integrations.transformers",
            {},
            "seqpar.integrations.transformers needs " + NEEDS_TRANSFORMERS,
        ),
        (
            "from seqpar.tensor_parallel import replace_attention",
            {},
            "seqpar.integrations.transformers needs " + NEEDS_TRANSFORMERS,
        ),
        (
            "import seqpar.testing.models.tiny",
            {},
            "seqpar.testing.models needs " + NEEDS_TRANSFORMERS,
        ),
        (
            "import seqpar",
            {"SEQPAR_CHECK_SHAPES": "1"},
            r"SEQPAR_CHECK_SHAPES=1 needs beartype(>=[\d.,<]+), which is not installed: "
            r"pip install 'beartype\1'",
        ),
        (
            "import seqpar.testing.drawn",
            {},
            r"seqpar.testing.drawn needs hypothesis(>=[\d.,<]+), which is not installed: "
            r"pip install 'hypothesis\1'",
        ),
    ],
    ids=["transformers", "replace_attention", "models", "shapes", "drawn"],
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(fresh, code, env, says):
    done = fresh.run("python", "-c", code, **env)
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(f"ModuleNotFoundError: {says}", last), last


@pytest.mark.parametrize(
    ("package", "version", "code", "says"),
    [
        ("torch", "2.9.1", "import seqpar", r"seqpar needs torch>=[\d.]+, got torch 2\.9\.1: "),
        (
            "transformers",
            "4.57.0",
            "import seqpar.integrations.transformers",
            r"seqpar\.integrations\.transformers needs transformers>=[\d.,<]+, got transformers 4\.57\.0: ",
        ),
    ],
    ids=["torch", "transformers"],
)
def test_an_old_version_is_refused_in_one_sentence(fresh, tmp_path, package, version, code, says):
    """Metadata of an old version goes before that of the real one."""
    about = tmp_path / f"{package}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if package == "transformers":
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    done = fresh.run("python", "-c", code, PYTHONPATH=str(tmp_path))
    last = done.stderr.splitlines()[-1]
    assert re.match(f"ImportError: {says}pip install '.*'$", last), last
