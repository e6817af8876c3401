"""How far long work is: a bar on a terminal, lines of a log elsewhere. On stderr: stdout is for results."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Protocol, TypeVar

from seqpar.commands.progress.log import Log

T = TypeVar("T")


class Steps(Protocol):
    """What tells of the steps of some work, from the start of a `with` block to its end."""

    def __enter__(self) -> Steps: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def begin(self, what: str) -> None:
        """Says at once what is being started: for steps of many seconds."""

    def say(self, text: str) -> None:
        """Says at once what is worth a line of its own."""

    def done(self, values: str = "", *, number: int | None = None) -> None:
        """Counts a step.

        Args:
            values: what is to be told of it, such as its loss.
            number: of the steps that are done, where some were before this run.
        """


def steps(what: str, total: int, *, shown: bool = True, ticking: bool = False) -> Steps:
    """What tells of `total` steps.

    Args:
        shown: false on all ranks but one.
        ticking: whether the clock of a bar goes on while a step of minutes runs elsewhere.
    """
    if not shown:
        return Silent()
    is_terminal = sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    if not is_terminal or find_spec("rich") is None:
        return Log(what, total)
    from seqpar.commands.progress.bar import Bar  # where rich is: nothing needs it

    return Bar(what, total, ticking=ticking)


def track(
    items: Collection[T],
    what: str,
    *,
    name: Callable[[T], str] | None = None,
    shown: bool = True,
    ticking: bool = False,
) -> Iterator[T]:
    """The items, one a step.

    Args:
        name: of an item, to say before its step; for steps of many seconds.
        shown, ticking: as in `steps`.
    """
    with steps(what, len(items), shown=shown, ticking=ticking) as progress:
        for item in items:
            if name is not None:
                progress.begin(name(item))
            yield item
            progress.done()


class Silent:
    """Tells nothing: for the other ranks."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, what: str) -> None:
        """Says nothing."""

    def say(self, text: str) -> None:
        """Says nothing."""

    def done(self, values: str = "", *, number: int | None = None) -> None:
        """Counts nothing."""
