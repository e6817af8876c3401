"""Learns what a plan sends, holds and computes on any rank, by a run of the strategy without content.

Tensors are on torch's meta device and the group is `silent`: nothing is computed and nothing sent, but all
that would be is seen. There is no second description of a strategy to keep in step with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from seqpar.calls.shape import Shape, Volume
from seqpar.calls.workspace import workspace
from seqpar.comm import Group, Message, silent
from seqpar.strategies.plan import Plan
from seqpar.strategies.registry import STRATEGIES
from seqpar_kernels.torch_internals import DRY_RUNS, DispatchMode, parts
from seqpar_kernels.torch_ops import RUNS
from seqpar_kernels.watching import Direction, watching

T = TypeVar("T")


@dataclass(frozen=True)
class Held:
    """The bytes of tensors on one rank: at the fullest moment of forward, between, and of backward.

    The caller's tensors are in it: q, k, v and out throughout, dout in backward.
    """

    forward: int
    kept: int
    backward: int

    @property
    def peak(self) -> int:
        """The bytes at the fullest moment of a step."""
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class Compute:
    """A block of scores that is computed, or differentiated.

    Args:
        rows, cols: of the block.
        scores: how many are visible, in all heads and batch entries.
    """

    direction: Direction
    rows: int
    cols: int
    scores: int


@dataclass(frozen=True)
class Exchange:
    """A batch of messages that is begun.

    Args:
        number: to be found again in `Wait`.
        sends, receives: (rank, bytes) of each message.
    """

    number: int
    primitive: str
    sends: tuple[tuple[int, int], ...]
    receives: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Wait:
    """The end of a batch of messages."""

    number: int


@dataclass(frozen=True)
class AllReduce:
    """A reduction over all ranks of so many bytes."""

    num_bytes: int


Step = Compute | Exchange | Wait | AllReduce


@dataclass(frozen=True)
class Steps:
    """The steps of a rank, in its order."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]


def sent(plan: Plan, shape: Shape, rank: int) -> Volume:
    """Counts what `rank` sends in a forward and a backward of a plan.

    Args:
        plan: with its implementation resolved, see `resolve`.
        shape: of the call. q, k and v get gradients, and what it says learns.
    """

    def run() -> Volume:
        # The generator stops after forward, so the first total is read before backward has run.
        groups = _run(plan, shape, rank, _Log(walks=False))
        forward, total = (group.traffic.total for group in groups)
        return Volume(forward, total - forward)

    return _apart(run)


def held(plan: Plan, shape: Shape, rank: int) -> Held:
    """Counts what `rank` holds in a forward and a backward; for the arguments see `sent`.

    What torch's attention on CPU allocates inside is measured, see `workspace`. Triton's kernels allocate
    nothing inside, the reference a tile; what other packages allocate inside is not counted.
    """
    parts(DRY_RUNS)

    def run() -> Held:
        with _Storages() as storages:
            phases = (storages.take() for _ in _run(plan, shape, rank, _Log(walks=True)))
            (forward, kept), (backward, _) = phases
        return Held(forward, kept, backward)

    return _apart(run)


def steps(plan: Plan, shape: Shape, rank: int) -> Steps:
    """Lists what `rank` computes (no stored scores), sends and receives; for the arguments see `sent`."""
    parts(DRY_RUNS)

    def run() -> Steps:
        log = _Log(walks=False)
        with _Ops():
            forward, backward = (log.take() for _ in _run(plan, shape, rank, log))
        return Steps(forward, backward)

    return _apart(run)


def _apart(run: Callable[[], T]) -> T:
    """What a function gives on a thread of its own, where nothing of the caller's is on.

    That would be hooks on what autograd saves (checkpointing, offloading), modes of torch, a replay, an op
    that is being computed, inference mode. Only the detection of anomalies is the whole process's.
    """

    def without_anomalies() -> T:
        with torch.autograd.set_detect_anomaly(mode=False):
            return run()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(without_anomalies).result()


def _run(plan: Plan, shape: Shape, rank: int, log: _Log) -> Iterator[Group]:
    """Runs forward and, if asked for more, backward; gives the group after each."""
    group = silent(rank, plan.group.size, log)
    with watching(log):
        plan, leaves = _without_content(plan, shape, group)
        q, k, v = leaves[:3]
        # docs/design.md: a dry run is the strategy itself
        results = STRATEGIES[plan.strategy].attend(q, k, v, plan, with_lse=shape.with_lse)
        ends = [x for x in results[: 1 + shape.with_lse] if x is not None]
        # A result that nobody asked for, such as lse, must not be alive when the caller counts.
        del results
        yield group
        given = torch.autograd.grad(ends, leaves, [torch.empty_like(x) for x in ends])
        yield group
        del given


def _without_content(plan: Plan, shape: Shape, group: Group) -> tuple[Plan, list[Tensor]]:
    """The plan for tensors on the meta device, and those that get gradients: q, k, v and what learns."""

    def empty(rows: int, heads: int, width: int) -> Tensor:
        sizes = shape.batch, rows, heads, width
        return torch.empty(sizes, dtype=shape.dtype, device="meta", requires_grad=True)

    rows, cols = plan.layout.rows[group.rank], plan.keys.rows[group.rank]
    leaves = [empty(rows, shape.hq, shape.d)]
    leaves += [empty(cols, shape.hkv, width) for width in (shape.d, shape.vd)]
    learned = {}
    for name, x in plan.score.tensors.items():
        learned[name] = x.detach().to("meta").requires_grad_(name in shape.learns)
        leaves += [learned[name]] if name in shape.learns else []
    return plan.on(group, learned), leaves


class _Log:
    """A list of steps, noted as they are told to it: it is a `Watcher` and a `Listener`."""

    def __init__(self, *, walks: bool) -> None:
        self.walks = walks
        self._steps: list[Step] = []

    def take(self) -> tuple[Step, ...]:
        """Gives what has been noted since it was last asked."""
        taken, self._steps = tuple(self._steps), []
        return taken

    def block(self, direction: Direction, rows: int, cols: int, scores: int) -> None:
        self._steps.append(Compute(direction, rows, cols, scores))

    def exchange(
        self, number: int, primitive: str, sends: Sequence[Message], receives: Sequence[Message]
    ) -> None:
        there, here = (
            tuple((peer, x.numel() * x.element_size()) for peer, x in messages)
            for messages in (sends, receives)
        )
        self._steps.append(Exchange(number, primitive, there, here))

    def wait(self, number: int) -> None:
        self._steps.append(Wait(number))

    def all_reduce(self, x: Tensor) -> None:
        self._steps.append(AllReduce(x.numel() * x.element_size()))


class _Ops(DispatchMode):
    """A mode that looks into this package's own ops, which are closed to other modes."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        run = RUNS.get(func.name())
        if run is None:
            return func(*args, **(kwargs or {}))
        # torch takes a mode off while it dispatches; here it must see what the op does.
        with self:
            return run(*args)


class _Storages(_Ops):
    """A mode that counts the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self._now = self._most = 0
        self._alive = WeakIdKeyDictionary()

    def take(self) -> tuple[int, int]:
        """Gives the bytes that are alive: (most since it was last asked, now)."""
        taken, self._most = (self._most, self._now), self._now
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self._see(x.untyped_storage())
        inside = workspace(func, args, kwargs or {})
        self._most = max(self._most, self._now + inside)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._alive:
            self._alive[storage] = True
            self._now += storage.nbytes()
            weakref.finalize(storage, self._lose, storage.nbytes())

    def _lose(self, num_bytes: int) -> None:
        self._now -= num_bytes
