"""`silent`: a group whose messages are not sent and do not arrive, to learn shapes, bytes and order from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from seqpar.comm.group import Group
from seqpar.comm.transport import NO_OPERATION, Message, Operation, Pending, ReduceOp


class Listener(Protocol):
    """An object that is told what would be sent."""

    def exchange(
        self, number: int, primitive: str, sends: Sequence[Message], receives: Sequence[Message]
    ) -> None:
        """A batch of messages is begun; batches are numbered from 0."""

    def wait(self, number: int) -> None:
        """A batch of messages has been waited for."""

    def all_reduce(self, x: Tensor) -> None:
        """A tensor is reduced over all ranks."""


def silent(rank: int, size: int, listener: Listener | None = None) -> Group:
    """The group of a rank that talks to nobody.

    Args:
        listener: is told of every message.
    """
    return Group(_Silent(rank, size, listener))


class _Silent:
    """A transport that tells its listener."""

    control_device = torch.device("cpu")

    def __init__(self, rank: int, size: int, listener: Listener | None) -> None:
        self.rank, self.size, self.global_ranks = rank, size, list(range(size))
        self._listener, self._number = listener, 0

    def exchange(
        self,
        primitive: str,
        sends: Sequence[Message],
        receives: Sequence[Message],
        operation: Operation = NO_OPERATION,  # noqa: ARG002
    ) -> Pending:
        number, self._number = self._number, self._number + 1
        if self._listener is not None:
            self._listener.exchange(number, primitive, sends, receives)
        return _Held(number, [x for _, x in (*sends, *receives)], self._listener)

    def check_device(self, device: torch.device) -> None:
        """Does nothing: nothing is sent."""

    def prepare(self, device: torch.device) -> None:
        """Does nothing: there is nothing to prepare."""

    def all_reduce(self, x: Tensor, op: ReduceOp, operation: Operation) -> None:  # noqa: ARG002
        """Adds nothing, but tells the listener."""
        if self._listener is not None:
            self._listener.all_reduce(x)

    def largest(self, x: Tensor, operation: Operation) -> Tensor:  # noqa: ARG002
        return x

    def gather_objects(self, item: object) -> list[object]:
        return [item] * self.size


class _Held:
    """Messages that are not sent, but hold their buffers until they are waited for, as real ones do."""

    def __init__(self, number: int, buffers: list[Tensor], listener: Listener | None) -> None:
        self._number, self._buffers, self._listener = number, buffers, listener

    def wait(self) -> None:
        """Lets go of the buffers."""
        self._buffers = []
        if self._listener is not None:
            self._listener.wait(self._number)
