"""`Watch`: waiting for a rank that is dead, stopped or at another operation ends in an error that names it.

Through the store of torch.distributed a thread of each process tells the others that it lives, and what it
waits for. It follows those tales from its own waits: to a rank that says nothing any more, or round a circle.
A rank that is busy may take as long as it likes.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

BEATS = 6  # within its patience a rank says so many times that it lives
MANY = 64  # ranks


class Store(Protocol):
    """What is used of a store of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        """Sets a value that all ranks can read."""

    def check(self, keys: list[str]) -> bool:
        """Whether the keys have values."""

    def get(self, key: str) -> bytes:
        """The value of a key."""


@dataclass(frozen=True, eq=False)
class Wait:
    """A wait of one rank. Ranks are those of the whole world.

    Args:
        place: the group and its operation; waits for each other at one place are messages under way.
        what: is waited for, in words.
        seconds: how long ago it began, when it was told.
        wake: ends it in an error.
    """

    rank: int
    ranks: tuple[int, ...]
    place: str
    what: str
    seconds: float = 0.0
    wake: Callable[[], None] = lambda: None
    since: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        several = "ranks" if len(self.ranks) > 1 else "rank"
        return f"rank {self.rank} waits for {several} {ranks} in {self.what}"


@dataclass
class _Heard:
    """What a rank told last, and at which beat of this rank it was heard first.

    Beats and not seconds, so that no time passes while a job is suspended.
    """

    tale: dict[str, Any]
    at: int


class Watch:
    """Looks after the waits of one process.

    Args:
        store: that all ranks share; used by a thread of the watch.
        patience: for how many seconds a rank may say nothing, and ranks may wait for each other.
    """

    def __init__(self, store: Store, rank: int, patience: float) -> None:
        self._store, self._rank, self.patience = store, rank, patience
        self._waits: list[Wait] = []
        self._why: dict[Wait, str] = {}
        self._heard: dict[int, _Heard] = {}
        self._circles: set[Wait] = set()
        self._beat, self._end, self._left = 0, "", False
        self._lock, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._run, name="seqpar watch", daemon=True).start()

    def begin(self, ranks: Sequence[int], place: str, what: str, wake: Callable[[], None]) -> Wait:
        """Notes that this rank begins to wait for others, until `finish`."""
        wait = Wait(self._rank, tuple(dict.fromkeys(ranks)), place, what, wake=wake)
        with self._lock:
            self._waits.append(wait)
        return wait

    def finish(self, wait: Wait) -> None:
        """Notes that a wait is over."""
        with self._lock:
            self._waits.remove(wait)
            self._circles.discard(wait)

    def why(self, wait: Wait, lost: Sequence[int], error: RuntimeError) -> str:
        """Why a wait failed: what the watch found, or what ranks that were lost have told."""
        if wait in self._why:
            return self._why.pop(wait)
        with suppress(RuntimeError):  # the store may be gone with its rank
            for rank in lost:
                heard = self._listen(rank)
                if heard is not None and heard.tale["end"]:
                    return f"rank {rank} gave up: {heard.tale['end']}"
                if heard is not None and heard.tale["left"]:
                    return f"rank {rank} has left"
            if "imed out" in str(error):  # the process group has less patience
                return self._look(wait, 0.0) or str(error)
        ranks = " or ".join(f"rank {rank}" for rank in lost)
        return f"{ranks} closed the connection: it was killed, or ended by an error of its own"

    def end(self, why: str) -> None:
        """Tells the others that this rank will not answer any more."""
        self._end = self._end or why
        with suppress(RuntimeError):
            self._tell()

    def leave(self) -> None:
        """Tells the others that this process has left, and ends the thread."""
        self._over.set()
        self._left = True
        with suppress(RuntimeError):
            self._tell()

    def _run(self) -> None:
        with suppress(RuntimeError):  # the store is gone, and with it whoever held it
            self._tell()
            while not self._over.wait(self.patience / BEATS):
                self._tell()
                with self._lock:
                    waits = list(self._waits)
                for wait in waits:
                    why = self._look(wait, self.patience)
                    if why is not None and self._is_still(wait):
                        self._why[wait] = why
                        self.end(why)
                        wait.wake()

    def _is_still(self, wait: Wait) -> bool:
        with self._lock:
            return wait in self._waits

    def _tell(self) -> None:
        self._beat += 1
        with self._lock:
            waits = [(w.ranks, w.place, w.what, time.monotonic() - w.since) for w in self._waits]
        tale = {
            "beat": self._beat,
            "every": self.patience / BEATS,
            "waits": waits,
            "end": self._end,
            "left": self._left,
        }
        self._store.set(_key(self._rank), json.dumps(tale))

    def _listen(self, rank: int) -> _Heard | None:
        """What a rank told last; `None` if it has told nothing yet."""
        if not self._store.check([_key(rank)]):
            return None
        tale, heard = json.loads(self._store.get(_key(rank))), self._heard.get(rank)
        if heard is None or heard.tale["beat"] != tale["beat"]:
            heard = self._heard[rank] = _Heard(tale, self._beat)
        return heard

    def _look(self, wait: Wait, patience: float) -> str | None:
        """Why a wait will not end, if that is known.

        Args:
            patience: for how many seconds ranks may wait for each other.
        """
        # docs/design.md: a wait is watched, not timed
        seconds, every = time.monotonic() - wait.since, self.patience / BEATS
        if seconds < every:
            return None
        # Many ranks that wait for a slow one would all read what all others told, so they take turns.
        in_turn = len(self._heard) <= MANY or (self._beat - self._rank) % BEATS == 0
        follows = seconds > patience and in_turn
        after: dict[Wait, list[Wait]] = {}
        waits: dict[int, list[Wait]] = {self._rank: [wait]}
        todo = [wait]
        while todo:
            at = todo.pop()
            after[at] = []
            for rank in at.ranks:
                heard = self._listen(rank)
                if heard is None:
                    continue
                silent = (self._beat - heard.at) * every
                if heard.tale["end"]:
                    return f"rank {rank} gave up: {heard.tale['end']}"
                if silent > max(self.patience, BEATS * heard.tale["every"]):
                    what = "was stopped or killed" if not heard.tale["left"] else "has left"
                    return f"rank {rank} has said nothing for {silent:.0f} s: it {what}"
                if rank not in waits and follows:
                    waits[rank] = [
                        Wait(rank, tuple(ranks), place, what, so_long)
                        for ranks, place, what, so_long in heard.tale["waits"]
                        if so_long > patience
                    ]
                    todo += waits[rank]
                after[at] += waits.get(rank, [])
        circle = _circle(after)
        # What ranks told is some seconds old, so one that goes on waiting is seen twice.
        if circle is None or wait in self._circles or not patience:
            return circle
        self._circles.add(wait)
        return None


def _circle(after: dict[Wait, list[Wait]]) -> str | None:
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


def _key(rank: int) -> str:
    return f"seqpar/where/{rank}"
