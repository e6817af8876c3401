"""What a group needs of the wire: point-to-point batches, a reduction, small objects.

Two kinds exist: `processes.ProcessTransport` over torch.distributed and `threads.ThreadTransport`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

Message = tuple[int, Tensor]  # (peer, contiguous tensor)
ReduceOp = Literal["sum", "max"]


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
        """Where tensors of a few bytes for agreement must live."""

    @property
    def global_ranks(self) -> list[int]:
        """By rank, what the whole world calls it."""

    def prepare(self, device: torch.device) -> None:
        """To be called by all ranks before some of them exchange tensors of a device."""

    def exchange(
        self, primitive: str, sends: Sequence[Message], receives: Sequence[Message]
    ) -> Pending:
        """Starts all sends and receives at once. Messages between two ranks keep their order."""

    def all_reduce(self, x: Tensor, op: ReduceOp) -> None:
        """Reduces a contiguous tensor over all ranks, in place."""

    def gather_objects(self, item: object) -> list[object]:
        """Every rank's small object, by rank."""
