"""Gathers an object or a tensor of every rank, point to point; torch's gathering of objects needs numpy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from seqpar.comm.transport import AGREE, NO_OPERATION, Operation, Transport


def gather_objects(transport: Transport, item: object) -> list[object]:
    """Gathers every rank's small object of JSON, by rank. All ranks must call."""
    device = transport.control_device
    # torch warns about memory that cannot be written, as that of bytes; a bytearray can be.
    raw = torch.frombuffer(bytearray(json.dumps(item).encode()), dtype=torch.uint8).to(device)
    count = torch.tensor([raw.numel()], device=device)
    counts = gather_tensors(transport, "gather_objects", count, [count] * transport.size)
    shapes = [raw.new_empty(int(n)) for n in counts]
    everyone = gather_tensors(transport, "gather_objects", raw, shapes)
    return [cast("object", json.loads(bytes(x.tolist()))) for x in everyone]


def largest(transport: Transport, x: Tensor, operation: Operation) -> Tensor:
    """The elementwise maximum over ranks, in ceil(log2 P) rounds of one message each. All ranks must call.

    In round n a rank hears from the one 2^n places before it what that rank and those before it know.
    Source: Hensgen, Finkel and Manber 1988, the dissemination barrier.
    """
    rank, size, reach = transport.rank, transport.size, 1
    while reach < size:
        heard = torch.empty_like(x)
        sends, receives = [((rank + reach) % size, x)], [((rank - reach) % size, heard)]
        transport.exchange(AGREE, sends, receives, operation).wait()
        x, reach = torch.maximum(x, heard), 2 * reach
    return x


def gather_tensors(
    transport: Transport,
    primitive: str,
    x: Tensor,
    shapes: Sequence[Tensor],
    operation: Operation = NO_OPERATION,
) -> list[Tensor]:
    """Gathers every rank's tensor, by rank. All ranks must call.

    Args:
        primitive: what the messages are called.
        shapes: a tensor that looks like each rank's.
    """
    rank = transport.rank
    others = [r for r in range(transport.size) if r != rank]
    everyone = [x.clone() if r == rank else torch.empty_like(s) for r, s in enumerate(shapes)]
    sends, receives = ([(r, x) for r in others], [(r, everyone[r]) for r in others])
    transport.exchange(primitive, sends, receives, operation).wait()
    return everyone
