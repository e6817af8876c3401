"""Faults of one rank, in a world of processes of their own, and what every other rank is told of them."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from seqpar.comm import DesyncError, Group, agreed, all_reduce
from seqpar.functional import attention
from seqpar.layout import contiguous
from seqpar.strategies import STRATEGIES, Plan
from seqpar.testing.loopback import ADDRESS, loopback_store, stay_on_loopback

PATIENCE_SECONDS = 3.0
GIVEN_UP_SECONDS = 60.0  # by the process group itself, and by `outcome`
LENGTH, ODD = 24, 1  # tokens, and the rank with the fault


@dataclass(frozen=True)
class World:
    """One rank of the world: the group that attends, and another one of the same ranks.

    Args:
        strategy: by which the ranks attend.
    """

    group: Group
    other: Group
    strategy: str

    @property
    def is_odd(self) -> bool:
        """Whether this rank is the one with the fault."""
        return self.group.rank == ODD

    def attend(self) -> Tensor:
        """A scalar that all ranks must go backward from."""
        layout = contiguous(LENGTH, self.group.size)
        grid = self.group.grid(ulysses=2) if STRATEGIES[self.strategy].needs_grid else None
        plan = Plan(self.group, layout, strategy=self.strategy, grid=grid)
        q = torch.randn(1, layout.rows[self.group.rank], 4, 8, requires_grad=True)
        return attention(q, q, q, plan).sum()


Fault = Callable[[World], None]
Phase = Callable[[World, Fault], None]


def killed(_: World) -> None:
    """Dies without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def stopped(_: World) -> None:
    """Lives, and does nothing any more."""
    os.kill(os.getpid(), signal.SIGSTOP)


def raises(_: World) -> None:
    """Has an error of its own."""
    raise ValueError("a batch that cannot be read")


def leaves(_: World) -> None:
    """Thinks that it is done."""
    raise SystemExit


def elsewhere(world: World) -> None:
    """Goes on to an operation of another group."""
    all_reduce(torch.ones(1), world.other)
    with agreed(world.other, operation="the next step"):
        pass


def slow(_: World) -> None:
    """Takes longer than the others have patience, and goes on."""
    time.sleep(2.5 * PATIENCE_SECONDS)


def before_a_call(world: World, fault: Fault) -> None:
    """Between two calls."""
    world.attend()
    if world.is_odd:
        fault(world)
    if not world.is_odd or fault is slow:
        world.attend()


def before_backward(world: World, fault: Fault) -> None:
    """Between forward and backward."""
    loss = world.attend()
    fault(world) if world.is_odd else loss.backward()


def inside_forward(world: World, fault: Fault) -> None:
    """When ranks have agreed, and some messages are sent."""
    if world.is_odd:
        _fail_at_message(world, fault)
    world.attend()


def inside_backward(world: World, fault: Fault) -> None:
    """The same, in backward."""
    loss = world.attend()
    if world.is_odd:
        _fail_at_message(world, fault)
    loss.backward()


def _fail_at_message(world: World, fault: Fault) -> None:
    exchange, sent = world.group.transport.exchange, []

    def failing(primitive: str, *args: object) -> object:
        sent.extend([primitive] * (primitive != "agree" and bool(args[0])))
        if len(sent) == 2 or primitive == "heads_to_rows":
            fault(world)
            if fault is not slow:
                raise SystemExit
        return exchange(primitive, *args)  # type: ignore[arg-type]

    world.group.transport.exchange = failing  # type: ignore[assignment, method-assign]


FAULTS: tuple[Fault, ...] = (killed, stopped, raises, leaves, elsewhere)
PHASES: tuple[Phase, ...] = (before_a_call, inside_forward, before_backward, inside_backward)


@dataclass(frozen=True)
class Told:
    """What a rank was told, after how many seconds, and what it was warned of before."""

    text: str
    seconds: float
    warnings: tuple[str, ...] = ()


def outcome(size: int, strategy: str, phase: Phase, fault: Fault) -> list[Told | None]:
    """What each rank but the odd one was told; `None` for one that still waits after a minute."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["seqpar.testing.worlds"])
    # Served from here, as torchrun does, so that it outlives every rank.
    store = loopback_store()
    pipes: list[Connection] = []
    processes = []
    for rank in range(size):
        here, there = context.Pipe()
        args = there, rank, size, store.port, strategy, phase, fault
        processes.append(context.Process(target=_run, args=args, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    deadline = time.monotonic() + GIVEN_UP_SECONDS
    found = [_told(pipe, deadline) for rank, pipe in enumerate(pipes) if rank != ODD]
    for process in processes:
        process.kill()
        process.join()
    return found


def _told(pipe: Connection, deadline: float) -> Told | None:
    try:
        return pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else None
    except EOFError:
        return Told("died without an exception", 0.0)


def _run(
    pipe: Connection, rank: int, size: int, port: int, strategy: str, phase: Phase, fault: Fault
) -> None:
    torch.set_num_threads(1)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("seqpar").addHandler(handler)
    timeout = timedelta(seconds=GIVEN_UP_SECONDS)
    stay_on_loopback()
    store = dist.TCPStore(ADDRESS, port)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    start = time.monotonic()
    try:
        other = Group.of(patience=PATIENCE_SECONDS)
        group = Group.of(dist.new_group(list(range(size))), patience=PATIENCE_SECONDS)
        phase(World(group, other, strategy), fault)
        text = "nothing"
    except DesyncError as error:
        text = f"DesyncError: {error}"
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}"
    pipe.send(Told(text, time.monotonic() - start, tuple(warnings)))
    os._exit(0)  # without a word to the others, as after an error that nobody catches
