"""`Log`: plain lines of text, for a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TextIO

# A step that ends so long after the last line gets a line. It is half of ten seconds, so that lines are at
# most ten seconds apart: of steps up to five seconds the next one ends in time, and longer ones all get one.
LINE_SECONDS = 5.0


class Log:
    """A line at the start, at the end, and in between at most every few seconds. A line is flushed.

    Args:
        what: the steps are of.
        total: how many there are.
        stream: by default stderr.
        clock: seconds from some moment on.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._stream = sys.stderr if stream is None else stream
        self._started = self._told = self._first_ended = self._last_ended = clock()
        self._num_here, self._number, self._values = 0, 0, ""

    def __enter__(self) -> Log:
        self.say("1 step" if self._total == 1 else f"{self._total} steps")
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.say(f"stopped at {self._far()}" if kind else self._far())

    def begin(self, what: str) -> None:
        """Says what is being started."""
        self.say(f"{what} ({self._number + 1} of {self._total})")

    def say(self, text: str) -> None:
        """Writes a line."""
        self._told = self._clock()
        print(f"{self._what}: {text}", file=self._stream, flush=True)

    def done(self, values: str = "", *, number: int | None = None) -> None:
        """Counts a step, and tells of it if the line before is old."""
        self._last_ended = self._clock()
        if not self._num_here:
            self._first_ended = self._last_ended
        self._num_here += 1
        self._number = self._number + 1 if number is None else number
        self._values = values
        is_last = self._number == self._total  # which the end tells of
        if not is_last and self._last_ended - self._told >= LINE_SECONDS:
            self.say(self._far())

    def _far(self) -> str:
        """How far it is: steps, times, and what the last step gave."""
        parts = [f"{self._number} of {self._total} in {_clock_time(self._clock() - self._started)}"]
        if self._num_here:
            seconds = self._step_seconds()
            parts.append(f"{seconds:.3g} s each")
            left = self._total - self._number
            parts += [f"{_clock_time(left * seconds)} left"] if left else []
        return ", ".join([*parts, self._values] if self._values else parts)

    def _step_seconds(self) -> float:
        """Mean of the steps so far, without the first if there are others: it warms up."""
        if self._num_here == 1:
            return self._first_ended - self._started
        return (self._last_ended - self._first_ended) / (self._num_here - 1)


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
