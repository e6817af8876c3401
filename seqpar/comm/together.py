"""`exchange_together`: small tensors for one rank are one message, large ones a message each.

A small message takes 0.1 ms and more, whatever it holds. A tensor that travels with others is copied out of
what came, where one that travels alone is received in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.comm.group import Group
from seqpar.comm.transport import Message, Pending

SMALL = 256 << 10  # bytes for one rank, up to which one message is faster


def exchange_together(
    group: Group, primitive: str, sends: Sequence[Message], receives: Sequence[Message]
) -> Pending:
    """Starts all sends and receives at once, as `Group.exchange` does, with few messages.

    Sender and receiver must list the same shapes and types for each other, in the same order: both decide
    by these what travels together.

    Args:
        sends: need not be contiguous.
        receives: contiguous, and filled once the exchange has been waited for.
    """
    # docs/design.md: small tensors travel together
    outgoing: list[Message] = []
    for peer, xs in _by_peer(sends):
        flat = [torch.cat([x.reshape(-1) for x in xs])] if _is_joined(xs) else xs
        outgoing += [(peer, x.contiguous()) for x in flat]
    incoming: list[Message] = []
    joined: list[tuple[Tensor, list[Tensor]]] = []
    for peer, xs in _by_peer(receives):
        if not _is_joined(xs):
            incoming += [(peer, x) for x in xs]
            continue
        flat_x = xs[0].new_empty(sum(x.numel() for x in xs))
        incoming.append((peer, flat_x))
        joined.append((flat_x, xs))
    return _Together(group.exchange(primitive, outgoing, incoming), joined)


class _Together:
    """Messages under way, some of which hold several tensors."""

    def __init__(self, pending: Pending, joined: list[tuple[Tensor, list[Tensor]]]) -> None:
        self._pending, self._joined = pending, joined

    def wait(self) -> None:
        """Waits, and puts every tensor in its place."""
        self._pending.wait()
        for flat, xs in self._joined:
            for x, part in zip(xs, flat.split([x.numel() for x in xs]), strict=True):
                x.copy_(part.view(x.shape))
        self._joined = []


def _by_peer(messages: Sequence[Message]) -> list[tuple[int, list[Tensor]]]:
    """The tensors for each rank, or from it, in their order."""
    found: dict[int, list[Tensor]] = {}
    for peer, x in messages:
        if x.numel():
            found.setdefault(peer, []).append(x)
    return list(found.items())


def _is_joined(xs: Sequence[Tensor]) -> bool:
    """Whether these travel as one message."""
    num_bytes = sum(x.numel() * x.element_size() for x in xs)
    return len(xs) > 1 and num_bytes <= SMALL and len({x.dtype for x in xs}) == 1
