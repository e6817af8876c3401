"""`ProcessWorld`: real processes with a gloo group, kept alive to run many functions.

One world serves every smaller number of ranks by subgroups. A world in which a function failed is
killed: its ranks may be anywhere.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from seqpar.comm import Group
from seqpar.testing.loopback import stay_on_loopback


class WorldError(RuntimeError):
    """A function failed on some rank of a world, or did not come back in time. The world is gone."""


class ProcessWorld:
    """`size` processes on this machine, each with `num_threads` threads.

    Functions and arguments are pickled, so functions must be importable.

    Args:
        preload: modules that ranks find imported. The first world of a program says which, for all.
    """

    def __init__(self, size: int, *, num_threads: int = 1, preload: Sequence[str] = ()) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        # One server process imports torch and forks the ranks: importing it in each takes 2 s a rank.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["seqpar.testing.worlds", *preload])
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(size):
            here, there = context.Pipe()
            args = rank, size, num_threads, self._folder.name, there
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self.run(_rank)

    def run(
        self, fn: Callable[..., Any], *args: Any, size: int | None = None, timeout: float = 120.0
    ) -> list[Any]:
        """`fn(group, *args)` on the first `size` ranks; the results by rank.

        Raises:
            WorldError: a rank raised, died, or took longer than `timeout` seconds; all tracebacks.
        """
        size = size or self.size
        for pipe in self._pipes[:size]:
            pipe.send((fn, args, size))
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(results) + len(failures) < size:
            open_pipes = {
                self._pipes[r]: r for r in range(size) if r not in results and r not in failures
            }
            # Once one rank failed the others get a moment to say how it looked from there.
            limit = min(deadline, time.monotonic() + 5) if failures else deadline
            ready = cast(
                "list[Connection]", wait(list(open_pipes), max(0.0, limit - time.monotonic()))
            )
            if not ready:
                late = sorted(open_pipes.values())
                failures |= {r: f"rank {r} did not come back in time" for r in late}
            for pipe in ready:
                rank = open_pipes[pipe]
                try:
                    is_ok, value = pipe.recv()
                except EOFError:
                    is_ok, value = False, f"rank {rank} died"
                (results if is_ok else failures)[rank] = value
        if failures:
            self.close()
            raise WorldError("\n".join(f"rank {r}: {text}" for r, text in sorted(failures.items())))
        return [results[r] for r in range(size)]

    def close(self) -> None:
        """Kills the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    @property
    def is_alive(self) -> bool:
        """Whether functions can be run."""
        return bool(self._processes)

    def __enter__(self) -> ProcessWorld:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_alive:
            self.close()


def _rank(group: Group) -> int:
    return group.rank


def _serve(rank: int, size: int, num_threads: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(num_threads)
    stay_on_loopback()
    store = dist.FileStore(os.path.join(folder, "store"), size)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    subgroups = {n: dist.new_group(list(range(n))) for n in range(1, size + 1)}
    while True:
        try:
            fn, args, num_ranks = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, fn(Group.of(subgroups[num_ranks]), *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
