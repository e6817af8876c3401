"""`agreed_backward`: backward is agreed on too, where it comes to an operation that sends on its way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from torch import Tensor

from seqpar.comm.agree import agreed
from seqpar.comm.group import Group
from seqpar.comm.replay import plays
from seqpar_kernels import any_order


class WayBack:
    """The way back of one operation, which passes the node on which ranks agree, or begins behind it."""

    def __init__(self) -> None:
        self.num_agreed = 0
        self.agree: Callable[[], None] | None = None  # where ranks do on the way back

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Nodes that are made inside, on this thread, are on this way."""
        token = _OPENED.set(self)
        try:
            yield
        finally:
            _OPENED.reset(token)


_OPENED: ContextVar[WayBack | None] = ContextVar("seqpar_way_back", default=None)


def arrival() -> Callable[[], None]:
    """What a node with parameters calls whenever backward comes to it, before it sends.

    Backward may begin right at it: a pipeline's schedule that takes gradients of inputs first comes back
    later for those of weights. Ranks agree then, as where backward passes all of the operation.
    """
    way, visits = _OPENED.get(), count(1)

    def arrive() -> None:
        # docs/design.md: backward is agreed on
        if way is not None and way.agree is not None and next(visits) > way.num_agreed:
            way.agree()

    return arrive


def agreed_backward(
    xs: Sequence[Tensor], group: Group, *, operation: str, way: WayBack | None = None
) -> tuple[Tensor, ...]:
    """The results of an operation, whose gradients are let through once all ranks are there with theirs.

    So ranks that go backward in another order, twice, or not at all, meet in an error and not in each other's
    messages. All ranks must call, in the same order, if gradients are wanted.

    Args:
        xs: the results; they share their memory with what is returned.
        operation: what gave them.
        way: the way back of the operation, where nodes on it have parameters.
    """
    if group.size == 1 or plays() or not any(x.requires_grad for x in xs):
        return tuple(xs)
    number, way = backward_number(group), way or WayBack()
    way.agree = lambda: agree_on_backward(group, f"the parameters of {operation}", number, ())
    return _AgreedBackward.apply(group, operation, number, way, *xs)


def backward_number(group: Group) -> int:
    """Numbers the backward of the operation that is done now; the same number on all ranks."""
    group.calls.with_backward += 1
    return group.calls.with_backward


def agree_on_backward(
    group: Group, operation: str, number: int, grads: Sequence[Tensor | None]
) -> None:
    """Compares which backward ranks are in, and which results have gradients. All ranks must call.

    Args:
        number: that `backward_number` gave in forward.

    Raises:
        DesyncError: ranks differ, or another rank is elsewhere.
    """
    with agreed(group, operation=f"backward of {operation} number {number}") as claim:
        claim["the results with gradients"] = [n for n, x in enumerate(grads) if x is not None]


class _AgreedBackward(torch.autograd.Function):
    """xs -> xs.    backward  dxs as they come, once all ranks have agreed."""

    @staticmethod
    def forward(
        ctx: Any, group: Group, operation: str, number: int, way: WayBack, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.way = (group, operation, number), way
        ctx.set_materialize_grads(False)
        # Aliases, because what is returned as it came may not be written to in place.
        return tuple(x.detach() for x in xs)

    @staticmethod
    @any_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # docs/design.md: backward is agreed on
        group, operation, number = ctx.call
        agree_on_backward(group, operation, number, grads)
        ctx.way.num_agreed += 1
        return None, None, None, None, *grads
