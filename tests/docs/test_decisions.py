"""The decisions of docs/design.md are cited where they explain a line, by the names that the page gives them.

A failure here localises a citation of a decision that was renamed or dropped, or a decision that no line
cites any more: the code that it explained has gone, or has lost the way to it.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = "docs/design.md"
CITED_IN = ("seqpar", "kernels", "scripts")

# Why no line cites a decision.
KERNELS = "it explains lines of kernels/"
EXCEPTIONS = {
    "FlashAttention-2 takes a band as a window": KERNELS,
    "Small kernels are fused where Triton runs": KERNELS,
    "Tile sizes are a table": KERNELS,
    "Packed documents are limits, not tiles": KERNELS,
    "Ops are made with `torch.library.Library`": KERNELS,
    "Scripts that are started from elsewhere keep their paths": "it explains where files lie, and no line",
}


def named(name):
    """A name as names are compared: the first letter and a full stop at the end do not count."""
    return name[:1].lower() + name[1:].rstrip(".")


def decisions(page):
    """The names of a page's decisions: what a paragraph begins with in bold."""
    return [named(name) for name in re.findall(r"^\*\*(.+?)\*\*", page, re.MULTILINE)]


def citations(source):
    """(line, decision) of every citation in a source."""
    for number, line in enumerate(source.splitlines(), 1):
        if found := re.search(rf"# {re.escape(PAGE)}: (.+)$", line):
            yield number, named(found[1])


def cited():
    """(place, decision) of every citation in the code."""
    for path in sorted(path for folder in CITED_IN for path in (ROOT / folder).rglob("*.py")):
        for number, name in citations(path.read_text("utf-8")):
            yield f"{path.relative_to(ROOT)}:{number}", name


NAMES = decisions((ROOT / PAGE).read_text("utf-8"))


def test_names_are_unique():
    assert len(NAMES) > 40
    assert len(set(NAMES)) == len(NAMES)


def test_what_is_cited_is_a_decision_of_the_page():
    assert [(place, name) for place, name in cited() if name not in NAMES] == []


def test_a_decision_is_cited_or_an_exception():
    known = {name for _, name in cited()} | set(map(named, EXCEPTIONS))
    assert [name for name in NAMES if name not in known] == []


def test_exceptions_are_decisions_that_are_not_cited():
    found = {name for _, name in cited()}
    for name in map(named, EXCEPTIONS):
        assert name in NAMES
        assert name not in found


def test_names_are_read_from_a_page_and_from_comments():
    assert decisions("**`x` is one.** Why.\n\nAnd **not** this. **Nor** this.\n") == ["`x` is one"]
    source = f"# {PAGE}: `x` is one\nf()  # {PAGE}: Y\n# see {PAGE}\n"
    assert list(citations(source)) == [(1, "`x` is one"), (2, "y")]
