"""The README's start-up script as its reader starts it, and what the page installs, links and shows."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_script_under_torchrun_runs_on_two_cpu_processes(tmp_path):
    (code,) = (block for block in BLOCKS if block.startswith("# attend.py\n"))
    (tmp_path / "attend.py").write_text(code, "utf-8")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "attend.py"], cwd=tmp_path, text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Two processes may write into one line.
    held = re.findall(r"rank (\d) of 2 holds (\(.*?\)) on cpu", done.stdout)
    assert sorted(held) == [("0", "(1, 500, 8, 64)"), ("1", "(1, 500, 8, 64)")]


def test_what_the_readme_installs_and_shows_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    installed = re.findall(r"pip install '?seqpar(?:\[(\w+)\])?", README)
    assert {"", "transformers"} <= set(installed)
    assert set(filter(None, installed)) <= extras["optional-dependencies"].keys()
    pictures = re.findall(r'<img src="(.*?)"', README)
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README)
    assert len(pictures) == 2
    assert [path for path in pictures + links if not (ROOT / path).exists()] == []
