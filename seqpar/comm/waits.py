"""`Wait`: what a rank waits for; `circle_of`: ranks that wait for each other and will do so for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from seqpar.comm.agree import named_ranks


@dataclass(eq=False)
class Wait:
    """A wait of one rank. Ranks are those of the whole world.

    Args:
        ranks: whose messages are not here; those that have come are left out.
        place: the group and its operation; waits for each other at one place are messages under way.
        what: is waited for, in words.
        seconds: how long ago it began, when it was told.
        wake: ends it in an error.
        reported: how many seconds it had lasted when the program was told of it.
    """

    rank: int
    ranks: tuple[int, ...]
    place: str
    what: str
    seconds: float = 0.0
    wake: Callable[[], None] = lambda: None
    since: float = field(default_factory=time.monotonic)
    reported: float = 0.0
    thread: int = field(default_factory=threading.get_ident)

    def turn_to(self, ranks: Sequence[int]) -> None:
        """Goes on to wait for other ranks."""
        self.ranks, self.since = tuple(dict.fromkeys(ranks)), time.monotonic()
        self.reported = 0.0

    def is_due(self, first: float) -> bool:
        """Whether the program is to be told of it: after so many seconds, then whenever they double."""
        seconds = time.monotonic() - self.since
        if seconds < max(first, 2 * self.reported):
            return False
        self.reported = seconds
        return True

    def __str__(self) -> str:
        return f"rank {self.rank} waits for {named_ranks(self.ranks)} in {self.what}"


def circle_of(after: dict[Wait, list[Wait]]) -> str | None:
    """Two waits at other places, of a circle of ranks that wait for each other; `None` if there are none."""
    for wait, others in after.items():
        for other in others:
            if other.place != wait.place and wait in _reached(other, after):
                return f"{wait}, and {other}"
    return None


def _reached(wait: Wait, after: dict[Wait, list[Wait]]) -> set[Wait]:
    seen, todo = {wait}, [wait]
    while todo:
        new = [w for w in after[todo.pop()] if w not in seen]
        seen.update(new)
        todo += new
    return seen
