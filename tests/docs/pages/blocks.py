"""The fenced blocks of a page, and the marks above them that say how each is run.

A mark is a comment on the line above the fence, which nobody sees who reads the page:

    <!-- run -->                      by itself, after the blocks above that are marked so
    <!-- run: NAME -->                with names that `settings` has for NAME, after the blocks above with it
    <!-- run: NAME on 4 ranks -->     the same on so many processes, each as torchrun starts it
    <!-- run, with A for B -->        with B replaced, as often as needed; also after a NAME and ranks
    <!-- not run: REASON -->

Shell is run by bash, from a folder where `scripts` is this repository's. A `text` block directly below
Python is what that prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[3]
PYTHON, SHELL, SHOWN = ("python", "diff"), ("sh", "bash"), "text"
HELP = "write <!-- run ... --> or <!-- not run: REASON --> above it, see tests/docs/pages/blocks.py"

_BLOCK = re.compile(
    r"^(?:[ ]*<!--(?P<mark>[^\n]*)-->\n)?(?P<indent>[ ]*)(?P<fence>```+|~~~+)(?P<language>[^\n]*)\n"
    r"(?P<text>.*?)^(?P=indent)(?P=fence)[ ]*$\n?",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(
    r"run(?:: (?P<name>[a-z ]+?)(?: on (?P<ranks>\d+) ranks)?)?(?P<with>(?:, with .+? for .+?)*)"
)
_WITH = re.compile(r", with (.+?) for (.+?)(?=, with |$)")
_ANY_MARK = re.compile(r"^[ ]*<!--\s*(?:not )?run\b", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        line: of the page, where the text begins.
        mark: what the comment above it says, if there is one.
        shown: the output below it, if there is one.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str | None
    shown: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether it is; if not, its mark gives the reason."""
        return not (self.mark or "").startswith("not run")

    @property
    def setting(self) -> tuple[str | None, int]:
        """(name of the setting, number of ranks)."""
        found = self._mark()
        return found["name"], int(found["ranks"] or 1)

    @property
    def code(self) -> str:
        """What is run: with the replacements of the mark; of a diff, what it makes."""
        text = self.side("+") if self.language == "diff" else self.text
        for new, old in self._replacements():
            text = text.replace(old, new)
        return text

    def side(self, sign: str) -> str:
        """What a diff makes ("+") or changes ("-")."""
        lines = self.text.splitlines(keepends=True)
        return "".join(line[1:] or "\n" for line in lines if line[0] in (sign, " ", "\n"))

    def problem(self) -> str | None:
        """What is wrong with the mark."""
        if self.language not in (*PYTHON, *SHELL, SHOWN):
            return f"```{self.language} is none of {(*PYTHON, *SHELL, SHOWN)}"
        if self.mark is None:
            what = "output that is not below Python" if self.language == SHOWN else "a block"
            return f"{what} without a mark: {HELP}"
        if re.fullmatch(r"not run: \S.+", self.mark):
            lost = [x for x in re.findall(r"[\w./]+\.py", self.mark) if not (ROOT / x).exists()]
            return f"the reason names {lost[0]}, which does not exist" if lost else None
        if not _MARK.fullmatch(self.mark) or self.language == SHOWN:
            return f"a mark that says nothing here, {self.mark!r}: {HELP}"
        idle = [old for _, old in self._replacements() if old not in self.text]
        return f"the mark replaces {idle[0]!r}, which is not in the block" if idle else None

    def _mark(self) -> re.Match[str]:
        found = _MARK.fullmatch(self.mark or "")
        assert found, f"{self.page}:{self.line}: {self.problem()}"
        return found

    def _replacements(self) -> list[tuple[str, str]]:
        return _WITH.findall(self._mark()["with"])


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """All blocks of a page, by its path from the root; an output belongs to the block above it."""
    text = (ROOT / page).read_text("utf-8") if text is None else text
    found: list[Block] = []
    end = -1
    for match in _BLOCK.finditer(text):
        mark = match["mark"] and match["mark"].strip()
        first = text[: match.start("text")].count("\n") + 1
        block = Block(page, first, match["language"].strip(), dedent(match["text"]), mark)
        is_below = text[end : match.start()] == "\n" and found[-1].language == "python"
        if block.language == SHOWN and mark is None and is_below:
            found[-1] = replace(found[-1], shown=block.text)
        else:
            found.append(block)
        end = match.end()
    return found


def problems(page: str, text: str | None = None) -> Iterator[str]:
    """What keeps a page from being run: blocks without a mark, marks that cannot be or are of no block."""
    text = (ROOT / page).read_text("utf-8") if text is None else text
    blocks = blocks_of(page, text)
    yield from (f"{page}:{b.line}: {why}" for b in blocks if (why := b.problem()))
    marked = sum(bool(b.mark and _ANY_MARK.match(f"<!-- {b.mark}")) for b in blocks)
    if len(_ANY_MARK.findall(text)) > marked:
        yield f"{page}: a mark that is not on the line above a block"
