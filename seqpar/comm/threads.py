"""The in-process world: ranks are threads of one process. For notebooks, property tests, one GPU.

It is stricter than a network. Receive buffers hold NaN until they are waited for. A buffer changed while it
is being sent is an error. A wait that can never end is found and raised on every rank.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from seqpar.comm.agree import DesyncError
from seqpar.comm.group import Group
from seqpar.comm.objects import largest
from seqpar.comm.transport import AGREE, NO_OPERATION, Message, Operation, ReduceOp

T = TypeVar("T")
INTERRUPTED = -1  # no rank, but the thread that waits for all of them
_Ticket = tuple[int, int, int]  # (source, destination, how many messages went before)


def simulate(world_size: int, fn: Callable[..., T], *args: Any) -> list[T]:
    """Runs `fn(group, *args)` on every rank of an in-process world; the results by rank.

    Ranks are threads: they share `args`, run on the devices their tensors live on, and their
    backward stays on their own thread.

    Raises:
        ValueError: world_size is not positive.
        RuntimeError: a rank called sys.exit.
        Exception: what a rank raised, from the lowest rank whose error is its own and not the echo
            of another rank's; a note says which rank.
    """
    if world_size < 1:
        raise ValueError(f"a world has at least one rank, got {world_size=}")
    world = _World(world_size)
    results: list[Any] = [None] * world_size
    grad_enabled = torch.is_grad_enabled()

    def run(rank: int) -> None:
        error: BaseException | None = None
        try:
            with (
                torch.autograd.set_multithreading_enabled(False),
                torch.set_grad_enabled(grad_enabled),
            ):
                transport = ThreadTransport(world, rank)
                results[rank] = fn(Group(transport), *args)
                transport.check_all_ended()
        except BaseException as caught:
            error = caught
        world.leave(rank, error)

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as interrupt:  # ranks stop where they would next wait
        world.leave(INTERRUPTED, interrupt)
        raise
    if not world.errors and world.unread:
        raise DesyncError(f"messages were sent that nobody received: {world.unread}")
    if world.errors:
        rank, error = min(world.errors.items(), key=lambda e: (isinstance(e[1], DesyncError), e[0]))
        where = f"on rank {rank} of {world_size} of a simulated world"
        if isinstance(error, SystemExit):  # which would end the program, perhaps as a success
            raise RuntimeError(f"sys.exit({error.code!r}) {where}") from error
        error.add_note(f"raised {where}")
        raise error
    return results


@dataclass(frozen=True)
class _What:
    """What a message is: two that meet must be equal. Words say more, for errors."""

    primitive: str
    numbers: tuple[int, ...]
    operation: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.primitive} of {self.operation}" if self.operation else self.primitive


class _World:
    """The post office of the ranks. Every method takes the lock."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.errors: dict[int, BaseException] = {}
        self._changed = threading.Condition()
        self._mail: dict[_Ticket, tuple[_What, Tensor]] = {}
        self._awaited: dict[int, _Ticket] = {}  # by waiting rank
        self._gone: set[int] = set()

    def post(self, ticket: _Ticket, what: _What, x: Tensor) -> None:
        with self._changed:
            self._mail[ticket] = (what, x)
            self._changed.notify_all()

    def collect(self, ticket: _Ticket, what: _What) -> Tensor:
        """The message with this ticket, once it is there."""
        source, rank, _ = ticket
        with self._changed:
            self._awaited[rank] = ticket
            try:
                # With this rank waiting too, the wait of another may be hopeless: it must look again.
                self._changed.notify_all()
                self._changed.wait_for(lambda: ticket in self._mail or self._is_hopeless(ticket))
            finally:
                del self._awaited[rank]
            if ticket in self._mail:
                sent_in, x = self._mail.pop(ticket)
                if sent_in != what:
                    raise DesyncError(f"rank {rank} is in {what}, rank {source} in {sent_in}")
                return x
            raise DesyncError(self._why(rank, source, what))

    @property
    def unread(self) -> list[str]:
        """The messages that were posted and not collected, in words."""
        return [f"{what} from rank {a} to {b}" for (a, b, _), (what, _) in self._mail.items()]

    def leave(self, rank: int, error: BaseException | None) -> None:
        with self._changed:
            self._gone.add(rank)
            if error is not None:
                self.errors[rank] = error
            self._changed.notify_all()

    def _is_hopeless(self, ticket: _Ticket) -> bool:
        """Whether the sender is gone, or every rank that is left waits for mail not yet sent."""
        if ticket[0] in self._gone or self.errors:
            return True
        everyone_waits = len(self._awaited) + len(self._gone) == self.size
        return everyone_waits and not any(t in self._mail for t in self._awaited.values())

    def _why(self, rank: int, source: int, what: _What) -> str:
        where = f"rank {rank} waits for rank {source} in {what}"
        if self.errors:
            failed, error = next(iter(self.errors.items()))
            if failed == INTERRUPTED:
                return f"{where}, but the world was interrupted"
            return f"{where}, but rank {failed} raised {type(error).__name__}: {error}"
        if source in self._gone:
            return f"{where}, but rank {source} has returned"
        return f"{where}, and every other rank waits too"


class ThreadTransport:
    """One rank of an in-process world."""

    control_device = torch.device("cpu")

    def __init__(self, world: _World, rank: int) -> None:
        self._world = world
        self.rank, self.size = rank, world.size
        self._operation = ""  # the last one that had messages
        self._num_sent: Counter[int] = Counter()
        self._num_received: Counter[int] = Counter()
        self._under_way: list[_ThreadPending] = []

    @property
    def global_ranks(self) -> list[int]:
        """The ranks themselves: there are no others."""
        return list(range(self.size))

    def check_device(self, device: torch.device) -> None:
        """Does nothing: tensors of any device are copied."""

    def prepare(self, device: torch.device) -> None:
        """Does nothing: there is nothing to prepare."""

    def exchange(
        self,
        primitive: str,
        sends: Sequence[Message],
        receives: Sequence[Message],
        operation: Operation = NO_OPERATION,
    ) -> _ThreadPending:
        """Posts copies of what is sent and notes what is to be received."""
        self._operation = operation.name
        numbers = () if primitive == AGREE else operation.numbers
        what = _What(primitive, numbers, operation.name)
        posted = [(peer, x, x.detach().clone()) for peer, x in sends]
        for peer, _, copy in posted:
            self._post(peer, what, copy)
        awaited = []
        for peer, x in receives:
            assert x.is_contiguous(), "messages are received in one piece"
            awaited.append(((peer, self.rank, self._num_received[peer]), x))
            self._num_received[peer] += 1
            # docs/design.md: the in-process world is stricter than a network
            if x.is_floating_point():
                x.fill_(float("nan"))
        sent = [(x, copy) for _, x, copy in posted]
        pending = _ThreadPending(self._world, what, sent, awaited, self._under_way)
        self._under_way.append(pending)
        return pending

    def check_all_ended(self) -> None:
        """Raises a DesyncError if messages were begun and never waited for: their buffers could be gone."""
        if self._under_way:
            what = ", ".join(str(pending.what) for pending in self._under_way)
            raise DesyncError(f"rank {self.rank} never waited for messages that it began: {what}")

    def all_reduce(self, x: Tensor, op: ReduceOp, operation: Operation) -> None:
        """Reduces a tensor in rank order, so that every rank gets the same bits."""
        everyone = [x if r == self.rank else torch.empty_like(x) for r in range(self.size)]
        others = [(r, y) for r, y in enumerate(everyone) if r != self.rank]
        self.exchange("all_reduce", [(r, x) for r, _ in others], others, operation).wait()
        stacked = torch.stack(everyone)
        x.copy_(stacked.sum(0, dtype=x.dtype) if op == "sum" else stacked.amax(0))

    def largest(self, x: Tensor, operation: Operation) -> Tensor:
        """The elementwise maximum over ranks of a few numbers."""
        return largest(self, x, operation)

    def gather_objects(self, item: object) -> list[object]:
        """Gathers every rank's object, by rank, passed by reference."""
        others = [r for r in range(self.size) if r != self.rank]
        what = _What("gather_objects", (), self._operation)
        for r in others:
            self._post(r, what, item)
        items = [item] * self.size
        for r in others:
            ticket = (r, self.rank, self._num_received[r])
            self._num_received[r] += 1
            items[r] = self._world.collect(ticket, what)
        return items

    def _post(self, peer: int, what: _What, item: Any) -> None:
        self._world.post((self.rank, peer, self._num_sent[peer]), what, item)
        self._num_sent[peer] += 1


class _ThreadPending:
    def __init__(
        self,
        world: _World,
        what: _What,
        sent: Sequence[tuple[Tensor, Tensor]],
        awaited: Sequence[tuple[_Ticket, Tensor]],
        under_way: list[_ThreadPending],
    ) -> None:
        self.what = what
        self._world, self._awaited, self._sent, self._under_way = world, awaited, sent, under_way

    def wait(self) -> None:
        if self in self._under_way:
            self._under_way.remove(self)
        for ticket, buffer in self._awaited:
            x = self._world.collect(ticket, self.what)
            if x.shape != buffer.shape or x.dtype != buffer.dtype:
                raise DesyncError(
                    f"rank {ticket[1]} expects {tuple(buffer.shape)} {buffer.dtype} from rank "
                    f"{ticket[0]} in {self.what}, got {tuple(x.shape)} {x.dtype}"
                )
            buffer.copy_(x)
        for x, copy in self._sent:
            # Clones, since a single element may be contiguous with any stride.
            now, then = (
                y.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
                for y in (x.detach(), copy)
            )
            same = torch.equal(now, then)
            assert same, f"{self.what}: a buffer was written while under way"
        self._awaited, self._sent = (), ()
