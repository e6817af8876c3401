"""What is asked of the blocks of docs/why-ulysses-is-right.md beside the outputs shown."""

import re

from pages.blocks import ROOT, blocks_of


def page():
    """The last block prints the table at the top; all others are shown with their output."""
    path = "docs/why-ulysses-is-right.md"
    printed = yield {}
    assert [block.shown is None for block in blocks_of(path)] == [False] * (len(printed) - 1) + [
        True
    ]
    table = re.search(r"(?:^\|.*\n)+", (ROOT / path).read_text("utf-8"), re.MULTILINE).group()
    assert printed[-1] == table
