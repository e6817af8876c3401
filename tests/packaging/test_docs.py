"""What `docs/why-ulysses-is-right.md` shows runs as it stands and prints what the page says it prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "why-ulysses-is-right.md").read_text("utf-8")
# (code, output shown below it); the last block's output is the table at the top
BLOCKS = re.findall(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", PAGE, re.DOTALL | re.MULTILINE
)
END = "\0\n"


@pytest.fixture(scope="module")
def printed():
    """What each block prints, all run in order in one namespace."""
    code = f"\nprint({END[:-1]!r})\n".join(block for block, _ in BLOCKS)
    command = [sys.executable, "-X", "utf8", "-c", code]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.split(END)


def test_every_output_shown_is_what_the_block_above_it_prints(printed):
    shown = [output for _, output in BLOCKS[:-1]]
    assert all(shown)
    assert len(shown) == PAGE.count("```text") == PAGE.count("```python") - 1
    assert printed[:-1] == shown


def test_the_table_at_the_top_is_what_the_last_block_prints(printed):
    table = re.search(r"(?:^\|.*\n)+", PAGE, re.MULTILINE).group()
    assert printed[-1] == table
