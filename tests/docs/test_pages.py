"""Every block of README and docs runs as it stands, or its mark says why not (see `pages.blocks`)."""

import os
import subprocess
import sys
from inspect import isgeneratorfunction
from pathlib import Path

import pytest
from pages.blocks import PYTHON, ROOT, SHELL, blocks_of, problems
from pages.run_blocks import run, settings_of

PAGES = ["README.md", "kernels/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
RUN = [b for page in PAGES for b in blocks_of(page) if b.is_run and b.problem() is None]


def together():
    """The Python blocks that share their names, in the order of the page."""
    found = {}
    for block in RUN:
        if block.language in PYTHON:
            found.setdefault((block.page, *block.setting), []).append(block)
    return [
        pytest.param(blocks, id=f"{key[0]}-{key[1] or 'itself'}") for key, blocks in found.items()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_how_it_is_run(page):
    assert list(problems(page)) == []
    named = {b.setting for b in RUN if b.page == page and b.setting[0]}
    there = {x for x, f in vars(settings_of(page) or object).items() if isgeneratorfunction(f)}
    assert sorted(name.replace(" ", "_") for name, _ in named) == sorted(there)


@pytest.mark.parametrize("blocks", together())
def test_python_runs_and_prints_what_is_shown_below_it(unused_processes, blocks):
    printed = unused_processes(blocks[0].setting[1]).run(run, blocks, timeout=240)[0]
    for block, text in zip(blocks, printed, strict=True):
        if block.shown is not None:
            assert text == block.shown, f"{block.page}:{block.line} shows another output"


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"{b.page}-{b.line}") for b in RUN if b.language in SHELL]
)
def test_shell_runs(block, tmp_path):
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code], cwd=tmp_path, capture_output=True, text=True,
        check=False, timeout=300, env=os.environ | {"PATH": paths, "SEQPAR_CHECK_SHAPES": "0"},
    )  # fmt: skip
    assert done.returncode == 0, f"{block.page}:{block.line}\n{done.stdout}{done.stderr}"


CODE = "```python\nprint(1)\n```\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (CODE, "2: a block without a mark"),
        ("```py\n1\n```\n", "2: ```py is none of"),
        ("~~~python\n1\n~~~\n", "2: a block without a mark"),
        ("1. a list\n   ```sh\n   ls\n   ```\n", "3: a block without a mark"),
        (f"<!-- rum -->\n{CODE}", "3: a mark that says nothing here, 'rum'"),
        (f"<!-- run: on 4 ranks -->\n{CODE}", "3: a mark that says nothing here"),
        (f"<!-- not run -->\n{CODE}", "3: a mark that says nothing here"),
        (
            f"<!-- not run: see tests/x/test_y.py -->\n{CODE}",
            "3: the reason names tests/x/test_y.py",
        ),
        (f'<!-- run, with "cpu" for "cuda" -->\n{CODE}', "3: the mark replaces '\"cuda\"', which"),
        (f"<!-- run -->\n\n{CODE}", "a mark that is not on the line above a block"),
        (
            f"{CODE.replace('1', '2')}Words.\n\n```text\n1\n```\n",
            "7: output that is not below Python",
        ),
        (f"<!-- run -->\n{CODE}\n```text\n1\n```\n", None),
        (f"<!-- run: a name on 4 ranks, with 2 for 1, with x for print -->\n{CODE}", None),
        (f"<!-- a picture -->\n\n<!-- not run: it takes hours -->\n{CODE}", None),
    ],
)
def test_what_a_mark_lacks_is_said(text, problem):
    found = [x.removeprefix("page:") for x in problems("page", text)]
    assert (problem is None) == (found == [])
    assert problem is None or any(problem in x for x in found)


def test_a_mark_replaces_and_a_diff_has_two_sides():
    mark = "<!-- run: a name on 4 ranks, with --n 2, a for --n 8, b, with x for y -->\n"
    (block,) = blocks_of("page", f"{mark}```diff\n same --n 8, b\n-old\n+y\n\n```\n")
    assert block.setting == ("a name", 4)
    assert block.code == "same --n 2, a\nx\n\n"
    assert block.side("-") == "same --n 8, b\nold\n\n"
