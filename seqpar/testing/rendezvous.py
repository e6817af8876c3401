"""`stuck`: whether batches of messages all come to an end where nothing is buffered, as on NCCL.

The steps of all ranks, as a dry run lists them, are run as in-order streams with rendezvous: a send and the
receive that it meets end together, once both have been begun, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from seqpar.calls.dry_run import AllReduce, Exchange, Step, Wait

_Pair = tuple[int, int]  # (source, destination)


def stuck(ranks: Sequence[Sequence[Step]], *, in_order: bool) -> str | None:
    """Says which ranks wait for each other for ever, or which messages do not fit or are not waited for.

    `None` if all is well.

    Args:
        ranks: by rank, its steps in its order.
        in_order: whether a batch ends before anything after it begins, as those of one NCCL communicator
            do, which are kernels of one stream. Otherwise it ends where the rank waits for it, as on gloo.
    """
    streams = [
        _Stream(rank, _in_order(steps) if in_order else steps) for rank, steps in enumerate(ranks)
    ]
    posted = _Posted()
    while any(stream.todo for stream in streams):
        moved = [stream.runs(posted) for stream in streams]
        reducing = [stream.reduces() for stream in streams]
        if any(moved):
            continue
        if None in reducing or len(set(reducing)) > 1:
            return "; ".join(str(stream) for stream in streams if stream.todo)
        for stream in streams:
            stream.todo.pop()
    return posted.misfit() or next((stream.left for stream in streams if stream.left), None)


def _in_order(steps: Sequence[Step]) -> list[Step]:
    """The steps with the end of each batch right after its beginning."""
    begun = [step for step in steps if not isinstance(step, Wait)]
    return [
        x
        for step in begun
        for x in ((step, Wait(step.number)) if isinstance(step, Exchange) else (step,))
    ]


@dataclass
class _Posted:
    """The sizes of the messages of every pair of ranks, in the order in which each side began them."""

    sends: dict[_Pair, list[int]] = field(default_factory=dict)
    receives: dict[_Pair, list[int]] = field(default_factory=dict)

    def begin(self, rank: int, batch: Exchange) -> list[tuple[dict[_Pair, list[int]], _Pair, int]]:
        """Begins the messages of a batch; gives what has to be there for each of them to end."""
        awaited = []
        for messages, mine, others in (
            (batch.sends, self.sends, self.receives), (batch.receives, self.receives, self.sends)
        ):  # fmt: skip
            for peer, num_bytes in messages:
                pair = (rank, peer) if mine is self.sends else (peer, rank)
                mine.setdefault(pair, []).append(num_bytes)
                awaited.append((others, pair, len(mine[pair])))
        return awaited

    def misfit(self) -> str | None:
        """A pair whose sends are not what is received, in words."""
        for pair in sorted({*self.sends, *self.receives}):
            sent, received = self.sends.get(pair, []), self.receives.get(pair, [])
            if sent != received:
                return f"rank {pair[0]} sends {sent} bytes to rank {pair[1]}, which receives {received}"
        return None


class _Stream:
    """What one rank has still to do."""

    def __init__(self, rank: int, steps: Sequence[Step]) -> None:
        self._rank = rank
        self.todo = list(reversed(steps))
        self._awaited: dict[int, list[tuple[dict[_Pair, list[int]], _Pair, int]]] = {}

    def runs(self, posted: _Posted) -> bool:
        """Goes on as far as it can; whether that is anywhere."""
        before = len(self.todo)
        while self.todo and not isinstance(step := self.todo[-1], AllReduce):
            if isinstance(step, Exchange):
                self._awaited[step.number] = posted.begin(self._rank, step)
            elif isinstance(step, Wait):
                if self._missing(step.number):
                    break
                del self._awaited[step.number]
            self.todo.pop()
        return len(self.todo) < before

    def reduces(self) -> int | None:
        """The bytes that it is to reduce next with all ranks, if that is next."""
        step = self.todo[-1] if self.todo else None
        return step.num_bytes if isinstance(step, AllReduce) else None

    @property
    def left(self) -> str | None:
        """The batches that it began and never waited for, in words."""
        if not self._awaited:
            return None
        return f"rank {self._rank} never waits for batches {', '.join(map(str, self._awaited))}"

    def _missing(self, number: int) -> list[_Pair]:
        awaited = self._awaited[number]
        return [pair for others, pair, count in awaited if len(others.get(pair, ())) < count]

    def __str__(self) -> str:
        step = self.todo[-1]
        if not isinstance(step, Wait):
            return f"rank {self._rank} is at {step}"
        pairs = ", ".join(f"{a} to {b}" for a, b in self._missing(step.number))
        return f"rank {self._rank} waits in batch {step.number} for messages of ranks {pairs}"
