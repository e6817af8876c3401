"""Type checkers see what is wrong with options and kinds, before anything runs.

torch is left out (it has types of its own, which take a minute to read): what is seen is the package's.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = f"""
[mypy]
mypy_path = {ROOT}:{ROOT}/kernels
python_version = 3.11
follow_imports = silent
ignore_missing_imports = true
cache_dir = {{cache}}

[mypy-torch.*]
follow_imports = skip
"""
RIGHT = """
import functools
import seqpar
from torch.distributed.device_mesh import DeviceMesh

def f(group: seqpar.Group, grid: seqpar.Grid, mesh: DeviceMesh, batch: dict[str, object]) -> None:
    mask = seqpar.Mask(causal=True)
    seqpar.RingAttention(mesh, mask=mask, agree="plan")
    seqpar.UlyssesAttention(group, head_chunks=2, mask=[mask], dropout=None)
    seqpar.HybridAttention(mesh, head_chunks=2, invariant=True)
    seqpar.MeshAttention(grid, implementation="aten")
    seqpar.MaterialisedAttention(group, shard="depth", score=seqpar.Score(0.5))
    seqpar.ShardedLoader([], group, seqpar.contiguous(4, 2), everyone=mesh)
    for kind in (seqpar.zigzag, seqpar.striped):
        seqpar.shard_batch(batch, group, kind)
    seqpar.shard_batch(batch, group, seqpar.balanced, mask=mask)
    seqpar.shard_batch(batch, group, functools.partial(seqpar.balanced, mask=mask))
    seqpar.shard_batch(batch, group, "striped", labels="own")
"""
WRONG = {
    "UlyssesAttention(group, bogus=3)": r'Unexpected keyword argument "bogus" for "UlyssesAttention"',
    "RingAttention(group, bogus=3)": r'Unexpected keyword argument "bogus" for "RingAttention"',
    "HybridAttention(grid, head_chunk=2)": r'Unexpected keyword argument "head_chunk"',
    'MeshAttention(grid, agree="plans")': r'Argument "agree" .* has incompatible type "Literal\[.plans',
    "MaterialisedAttention(group, mask=3)": r'Argument "mask" .* has incompatible type "int"',
    'shard_batch({}, group, "zigzagg")': r'Argument 3 to "shard_batch" has incompatible type "Literal',
    'shard_batch({}, group, kind="round")': r'Argument "kind" to "shard_batch" has incompatible type',
    'ShardedLoader([], group, "zigzagg")': r'Argument 3 to "ShardedLoader" has incompatible type',
    "ShardedLoader([], group, seqpar.Layout)": r'Argument 3 to "ShardedLoader" has incompatible type',
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What mypy says of the right and of the wrong calls: by line of the latter."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "mypy.ini").write_text(SETTINGS.format(cache=folder / "cache"), "utf-8")
    head = "import seqpar\ndef f(group: seqpar.Group, grid: seqpar.Grid) -> None:\n"
    (folder / "wrong.py").write_text(head + "".join(f"    seqpar.{x}\n" for x in WRONG), "utf-8")
    (folder / "right.py").write_text(RIGHT, "utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "wrong.py", "right.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_right_options_and_kinds_are_let_through(found):
    assert "right.py" not in found, found


@pytest.mark.parametrize("call", WRONG)
def test_wrong_options_and_kinds_are_found(found, call):
    line = 3 + list(WRONG).index(call)
    assert re.search(rf"^wrong.py:{line}: error: {WRONG[call]}", found, re.MULTILINE), found
