"""`Transport`: all that a group needs of the wire: point-to-point batches, a reduction, small objects.

Messages travel by `processes.ProcessTransport`, over torch.distributed, or by `threads.ThreadTransport`. A
group of one, a dimension of a grid and a silent group have small transports of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Message = tuple[int, Tensor]  # (peer, contiguous tensor)
ReduceOp = Literal["sum", "max"]
AGREE = "agree"  # the primitive whose messages meet each other whatever the operations are


class Operation(NamedTuple):
    """What a group agreed on last: its number, in a view of a group after that of the whole, and its name."""

    numbers: tuple[int, ...] = ()
    name: str = ""


NO_OPERATION = Operation()


class Pending(Protocol):
    """Sends and receives under way."""

    def wait(self) -> None:
        """Returns once receive buffers are filled and send buffers may be written again."""


class Transport(Protocol):
    """The wire of one rank. Peers are group-local ranks."""

    rank: int
    size: int

    @property
    def control_device(self) -> torch.device:
        """The device on which the few bytes of agreement must live."""

    @property
    def global_ranks(self) -> list[int]:
        """The numbers of the ranks in the whole world, by rank."""

    def check_device(self, device: torch.device) -> None:
        """Raises a ValueError if tensors of a device cannot be sent, and says what to do."""

    def prepare(self, device: torch.device) -> None:
        """Prepares for tensors of a device. All ranks must call, before some of them exchange such."""

    def exchange(
        self,
        primitive: str,
        sends: Sequence[Message],
        receives: Sequence[Message],
        operation: Operation = NO_OPERATION,
    ) -> Pending:
        """Starts all sends and receives at once. Messages between two ranks keep their order.

        Args:
            operation: which of a group's operations the messages are part of. Where the wire can tell
                messages apart, one never arrives as part of another operation or primitive.
        """

    def all_reduce(self, x: Tensor, op: ReduceOp, operation: Operation) -> None:
        """Reduces a contiguous tensor over all ranks, in place."""

    def largest(self, x: Tensor, operation: Operation) -> Tensor:
        """The elementwise maximum over ranks of a few numbers on the control device: agreement.

        Such messages meet whatever the operation of each rank is.
        """

    def gather_objects(self, item: object) -> list[object]:
        """Gathers every rank's small object, by rank: text, numbers, lists, and mappings by text."""
