"""`Replay`: results of attention and of its communication, kept so that neither is done a second time.

A step that is costly asks the replay first. While it records, the replay keeps what the step gives; while it
plays, it gives that back in the same order, and the step is not done: activation checkpointing and compiled
backwards build the graph anew from what was kept. Nothing here knows what the steps are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from torch import Tensor

from seqpar_kernels.torch_internals import version

Results = tuple[Tensor, ...]
Mode = Literal["record", "play", "outline"]


def _differing(then: object, now: object) -> str:
    """In what two calls differ, in words."""
    if not isinstance(then, dict) or not isinstance(now, dict):
        return f"{then or 'no call'} then, {now} now"
    names = [name for name in now if repr(then.get(name)) != repr(now[name])]
    return ", ".join(f"{name} {then.get(name)} then, {now[name]} now" for name in names)


class Replay:
    """A record of what the steps of one computation gave, in their order.

    Args:
        tensors: what has been recorded elsewhere, to be played.
        pack: what is kept in place of a tensor, as with torch's hooks of saved tensors; by default itself.
        unpack: the tensor again.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor] = (),
        pack: Callable[[Tensor], Any] = lambda x: x,
        unpack: Callable[[Any], Tensor] = lambda x: x,
    ) -> None:
        self._tensors: list[Any] = list(tensors)
        self._versions = [version(x) for x in tensors]
        self._pack, self._unpack = pack, unpack
        self._counts: list[int] = []  # by step
        self._calls: list[object] = []
        self._next = self._step = self._call = 0
        self.mode: Mode = "record"

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that were kept, one after another."""
        return self._tensors

    @contextmanager
    def record(self) -> Iterator[Replay]:
        """Keeps the results of the steps that are done inside, on this thread. Of a new replay, once."""
        with self._used("record"):
            yield self

    @contextmanager
    def outline(self) -> Iterator[Replay]:
        """Records on tensors without content: steps that can tell what they give are not done."""
        with self._used("outline"):
            yield self

    @contextmanager
    def play(self) -> Iterator[Replay]:
        """Gives what was kept to the steps inside, on this thread, from the first one."""
        self._next = self._step = self._call = 0
        with self._used("play"):
            yield self

    def called(self, call: object) -> None:
        """Announces the call that the next steps belong to; when the replay plays, it must be the same again.

        Raises:
            RuntimeError: it is another call than was recorded.
        """
        if self.mode != "play":
            self._calls.append(call)
            return
        recorded = self._calls[self._call] if self._call < len(self._calls) else None
        if recorded != call:
            raise RuntimeError(
                "attention is called otherwise when it is recomputed than it was before: "
                f"{_differing(recorded, call)}; what is assigned to a module (its dropout, its score) must "
                "be assigned inside of what is checkpointed"
            )
        self._call += 1

    def keep(self, results: Results) -> None:
        """Keeps the results of a step."""
        kept = [x.detach() for x in results]  # shares the version, not the graph
        self._counts.append(len(kept))
        self._tensors += [self._pack(x) for x in kept]
        self._versions += [version(x) for x in kept]

    def take(self, num: int | None = None) -> Results:
        """Gives back the results of the next step.

        Args:
            num: how many they are, if they were recorded elsewhere.

        Raises:
            RuntimeError: a result has been written to since.
        """
        if num is None:
            num, self._step = self._counts[self._step], self._step + 1
        return tuple(self._one() for _ in range(num))

    @contextmanager
    def _used(self, mode: Mode) -> Iterator[None]:
        self.mode = mode
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    def _one(self) -> Tensor:
        x, before = self._tensors[self._next], self._versions[self._next]
        self._next += 1
        if not isinstance(x, Tensor):  # a copy, which nobody writes to
            return self._unpack(x)
        if version(x) != before:
            raise RuntimeError(
                "what attention gave has been written to in place, so it cannot be kept for backward; "
                "use an out-of-place operation on the output of attention"
            )
        return x.detach()  # an alias, so that what is done to it does not reach the replay


# The replay of what runs on this thread just now; as with torch's own modes, it ends with a `with`.
_CURRENT: ContextVar[Replay | None] = ContextVar("seqpar_replay", default=None)


def current_replay() -> Replay | None:
    """The replay that records or plays on this thread."""
    return _CURRENT.get()


def plays() -> bool:
    """Whether steps are given their results, so that nothing is to be sent."""
    replay = _CURRENT.get()
    return replay is not None and replay.mode == "play"


def once(
    step: Callable[[], Results],
    num: int | None = None,
    outline: Callable[[], Results] | None = None,
) -> Results:
    """Does a step, or gives back what it gave when it was recorded.

    Args:
        num: how many results it has, unless only a replay that recorded it will play it.
        outline: tensors like its results, where the step should not be done to know them.
    """
    replay = _CURRENT.get()
    if replay is None:
        return step()
    if replay.mode == "play":
        return replay.take(num)
    # docs/design.md: a replay keeps what must not be done twice
    outside = _CURRENT.set(None)  # or steps inside of this one would be kept a second time
    try:
        results = outline() if outline is not None and replay.mode == "outline" else step()
    finally:
        _CURRENT.reset(outside)
    replay.keep(results)
    return results
