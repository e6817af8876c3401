"""Keeps the threads of gloo from taking the CPU of a thread that is in the middle of a send.

Each process group of gloo has a thread that moves bytes, and each connection a lock. On Linux a thread that
wakes up may take the CPU of one that runs. If that one is sending, it is stopped while it holds the lock, and
the thread that woke asks for the lock again and again until its time slice ends: milliseconds, for a message
of 0.1 ms. A batch thread, when it wakes up, waits for a CPU instead.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

TASKS, NAME = Path("/proc/self/task"), "gloo_tcp_loop"  # in the comm of each


def calm_gloo() -> None:
    """Makes batch threads of the threads of gloo in this process, on Linux.

    Those that have another policy than the usual one already are left alone, and so are all where the system
    forbids it.
    """
    if sys.platform != "linux":
        return
    for number in gloo_threads():
        with suppress(OSError):  # it has ended, or a sandbox forbids it
            if os.sched_getscheduler(number) == os.SCHED_OTHER:
                os.sched_setscheduler(number, os.SCHED_BATCH, os.sched_param(0))


def gloo_threads() -> list[int]:
    """The numbers of the threads of this process that move bytes for gloo. Linux only."""
    numbers = []
    with suppress(OSError):  # there may be no /proc
        for thread in TASKS.iterdir():
            with suppress(OSError):  # it has ended
                if (thread / "comm").read_text().strip() == NAME:
                    numbers.append(int(thread.name))
    return numbers
