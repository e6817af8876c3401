"""`Watch`: waiting for a rank that is dead, stopped or at another operation ends in an error that names it.

Through the store of torch.distributed a thread of each process tells the others that it lives, and what it
waits for. It follows those tales from its own waits: to a rank that says nothing any more, or round a circle.
A rank that is busy may take as long as it likes. Nothing else but that thread uses the store, which may be
gone with its rank, or not answer.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from seqpar.comm.tales import Store, Tales
from seqpar.comm.waits import Wait, circle_of

LOGGER = logging.getLogger("seqpar")

BEATS = 6  # within its patience a rank says so many times that it lives
MANY = 64  # ranks
ANSWER_SECONDS = 2.0  # how long a rank that failed waits to hear why
SHOWN = 4  # ranks that are waited for, of which a message says what they do
LEAVE_SECONDS = 0.5  # how long a process that ends waits for its watch to say so


@dataclass(eq=False)
class _Question:
    """Why a wait failed. Answered by the thread of the watch."""

    wait: Wait
    timed_out: bool
    answer: str | None = None
    is_answered: threading.Event = field(default_factory=threading.Event)


class Watch:
    """Looks after the waits of one process.

    Args:
        store: that all ranks share.
        patience: for how many seconds a rank may say nothing, and ranks may wait for each other.
    """

    def __init__(self, store: Store, rank: int, patience: float) -> None:
        self._tales, self._rank, self.patience = Tales(store, rank), rank, patience
        self._process = os.getpid()
        self._waits: list[Wait] = []
        self._threads = {threading.get_ident()}  # that have ever waited, or may yet
        self._questions: list[_Question] = []
        self._to_tell: list[threading.Event] = []
        self._why: dict[Wait, str] = {}
        self._circles: set[Wait] = set()
        self._failures = 0
        self._end, self._left = "", False
        self._lock, self._awake = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="seqpar watch", daemon=True)
        self._thread.start()

    def begin(self, ranks: Sequence[int], place: str, what: str, wake: Callable[[], None]) -> Wait:
        """Notes that this rank begins to wait for others, until `finish`."""
        wait = Wait(self._rank, tuple(dict.fromkeys(ranks)), place, what, wake=wake)
        with self._lock:
            self._waits.append(wait)
            self._threads.add(wait.thread)
        return wait

    def finish(self, wait: Wait) -> None:
        """Notes that a wait is over."""
        with self._lock:
            self._waits.remove(wait)
            self._circles.discard(wait)

    def why(self, wait: Wait, error: RuntimeError) -> str:
        """Why a wait failed: what the watch found, or what the ranks that it waited for have told."""
        if wait in self._why:
            return self._why.pop(wait)
        question = _Question(wait, "imed out" in str(error))
        self._questions.append(question)
        self._awake.set()
        question.is_answered.wait(ANSWER_SECONDS)
        if question.answer is not None:
            return question.answer
        if question.timed_out:
            return str(error)
        ranks = " or ".join(f"rank {rank}" for rank in wait.ranks)
        return f"{ranks} closed the connection: it was killed, or ended by an error of its own ({error})"

    def end(self, why: str) -> None:
        """Tells the others that this rank will not answer any more, before its connections close."""
        self._end = self._end or why
        told = threading.Event()
        self._to_tell.append(told)
        self._awake.set()
        told.wait(ANSWER_SECONDS)

    def leave(self) -> None:
        """Tells the others that this process has left, and ends the thread."""
        if os.getpid() != self._process:  # a child that was forked
            return
        self._left = True
        self._awake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(LEAVE_SECONDS)

    def _run(self) -> None:
        while self._failures < BEATS:  # then the store is gone, and with it whoever held it
            try:
                self._turn()
                self._failures = 0
            except RuntimeError:
                self._failures += 1
            if self._left:
                return
            self._awake.wait(self.patience / BEATS)
            self._awake.clear()

    def _turn(self) -> None:
        waiting_to_tell = self._to_tell[:]
        self._tell()
        for told in waiting_to_tell:
            told.set()
            self._to_tell.remove(told)
        while self._questions:
            self._answer(self._questions.pop())
        with self._lock:
            waits = list(self._waits)
        for wait in waits:
            why = self._look(wait, self.patience)
            if not self._is_still(wait):
                continue
            if why is not None:
                self._why[wait] = why
                self._end = self._end or why
                self._tell()
                wait.wake()
            elif wait.is_due(self.patience / 2):
                doing = "; ".join(self._tales.doing(rank) for rank in wait.ranks[:SHOWN])
                _warn(f"{wait}, for {wait.reported:.0f} s so far: {doing}")

    def _is_still(self, wait: Wait) -> bool:
        with self._lock:
            return wait in self._waits

    def _answer(self, question: _Question) -> None:
        try:
            for rank in question.wait.ranks:
                tale = self._tales.listen(rank).tale
                if tale.get("end"):
                    question.answer = f"rank {rank} gave up: {tale['end']}"
                elif tale.get("left"):
                    question.answer = f"rank {rank} has left"
            if question.timed_out and question.answer is None:
                # The process group has less patience.
                question.answer = self._look(question.wait, 0.0)
        finally:
            question.is_answered.set()

    def _tell(self) -> None:
        alive = {thread.ident for thread in threading.enumerate()}
        with self._lock:
            self._threads &= alive
            busy = self._threads - {wait.thread for wait in self._waits}
            waits = [(w.ranks, w.place, w.what, time.monotonic() - w.since) for w in self._waits]
        tale = {
            "every": self.patience / BEATS,
            "busy": len(busy),
            "waits": waits,
            "end": self._end,
            "left": self._left,
        }
        self._tales.tell(tale)

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
        in_turn = self._tales.tellers <= MANY or (self._tales.beat - self._rank) % BEATS == 0
        follows = seconds > patience and in_turn
        after: dict[Wait, list[Wait]] = {}
        waits: dict[int, list[Wait]] = {self._rank: [wait]}
        todo = [wait]
        while todo:
            at = todo.pop()
            after[at] = []
            for rank in at.ranks:
                heard = self._tales.listen(rank)
                if not heard.tale:
                    continue
                silent = (self._tales.beat - heard.at) * every
                if heard.tale["end"]:
                    return f"rank {rank} gave up: {heard.tale['end']}"
                if silent > max(self.patience, BEATS * heard.tale["every"]):
                    what = "was stopped or killed" if not heard.tale["left"] else "has left"
                    return f"rank {rank} has said nothing for {silent:.0f} s: it {what}"
                # A rank with a thread that is busy may yet send what is waited for.
                if rank not in waits and follows and not heard.tale["busy"]:
                    waits[rank] = [
                        Wait(rank, tuple(ranks), place, what, so_long)
                        for ranks, place, what, so_long in heard.tale["waits"]
                        if so_long > patience
                    ]
                    todo += waits[rank]
                after[at] += waits.get(rank, [])
        circle = circle_of(after)
        # What ranks told is some seconds old, so one that goes on waiting is seen twice.
        if circle is None or wait in self._circles or not patience:
            return circle
        self._circles.add(wait)
        return None


def _warn(text: str) -> None:
    """Logs from a thread of its own: handlers are the program's, and may raise, or not come back."""
    threading.Thread(target=LOGGER.warning, args=("%s", text), daemon=True).start()
