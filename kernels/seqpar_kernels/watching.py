"""`watching`: tells what is computed on tensors without content, in a dry run.

Inside of it implementations do all that they do but for their arithmetic: what they allocate is allocated on
torch's meta device, kernels are not launched. Nothing is chosen by device, since meta tensors have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol

Direction = Literal["forward", "backward"]


class Watcher(Protocol):
    """Who is told.

    Args:
        walks: whether implementations do all that they do but for arithmetic; otherwise a block is told
            of and left alone.
    """

    walks: bool

    def block(self, direction: Direction, rows: int, cols: int, scores: int) -> None:
        """A block of scores is computed, or differentiated.

        Args:
            rows, cols: of the block.
            scores: how many of them are visible, in all heads and batch entries.
        """


# The watcher of what runs on this thread just now; it ends with a `with`, as torch's own modes do.
_CURRENT: ContextVar[Watcher | None] = ContextVar("seqpar_watcher", default=None)


@contextmanager
def watching(told: Watcher) -> Iterator[None]:
    """Tells somebody what is computed inside, on this thread. Nothing inside has content."""
    token = _CURRENT.set(told)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def watcher() -> Watcher | None:
    """Who is told of what runs on this thread: somebody in a dry run."""
    return _CURRENT.get()


class Unlaunched:
    """An implementation that only launches kernels, in a dry run."""

    @staticmethod
    def forward(*_: object) -> None:
        """Allocates nothing."""

    @staticmethod
    def backward(*_: object, **__: object) -> None:
        """Allocates nothing."""
