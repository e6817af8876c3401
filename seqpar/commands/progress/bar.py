"""`Bar`: a bar of rich, for somebody who looks at a terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

DRAW_SECONDS = 0.1  # short steps need not all be drawn


class Bar:
    """Draws itself when steps end, on stderr.

    No thread refreshes it, unless asked for: that would compete with the ranks for the cores, and be in
    what is measured.

    Args:
        what: the steps are of.
        total: how many there are.
        ticking: whether a thread moves the clock once a second, for steps of minutes in other processes.
    """

    def __init__(self, what: str, total: int, *, ticking: bool = False) -> None:
        description, bar, *left = Progress.get_default_columns()
        self._bar = Progress(
            description,
            bar,
            *([TimeElapsedColumn()] if ticking else left),
            console=Console(stderr=True),
            auto_refresh=ticking,
            refresh_per_second=1,
            redirect_stdout=sys.stdout.isatty(),  # results that go to a file must get there
        )
        self._what, self._drawn = what, time.monotonic()
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Bar:
        self._bar.start()
        self._bar.refresh()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        """Shows what is being started."""
        self._bar.update(self._task, description=f"{self._what}: {what}", refresh=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def done(self, values: str = "", *, number: int | None = None) -> None:
        """Counts a step, and draws it if the last drawing is old."""
        if values:
            self._bar.update(self._task, description=values)
        advance = 1 if number is None else None
        self._bar.update(self._task, advance=advance, completed=number)
        if time.monotonic() - self._drawn >= DRAW_SECONDS:
            self._bar.refresh()
            self._drawn = time.monotonic()
