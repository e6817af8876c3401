"""`AsyncExchange`: an exchange that is begun, left to go on while something else is done, and waited for.

Differentiable once: where it is waited for, backward begins the dual exchange, and waits where it was begun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.comm.replay import once, plays
from seqpar_kernels import first_only

Finish = Callable[[], tuple[Tensor, ...]]  # waits, and gives what has come
Begin = Callable[[Sequence[Tensor]], Finish]


class AsyncExchange:
    """An exchange under way.

    Autograd goes back through what was done last, so what is done between start and wait is what the dual
    exchange overlaps with too. All ranks must begin exchanges, and wait for them, in the same order.

    Args:
        xs: what is exchanged.
        there: begins the exchange.
        back: begins its dual, with the gradients of what it brought; it brings those of `xs`.
    """

    def __init__(self, xs: Sequence[Tensor], there: Begin, back: Begin) -> None:
        self._there, self._back = there, back
        self._finish: Finish | None = None
        self.num = len(xs)
        # This comes last: it begins the exchange, which sets `_finish`.
        self._token: Tensor | None = _Start.apply(self, *xs)

    def wait(self, *, kept: bool = False) -> tuple[Tensor, ...]:
        """Waits for what the exchange brings. To be called once.

        Args:
            kept: makes activation checkpointing recompute as far as here. It stops at the last tensor that
                is kept for backward; if that lies between start and wait, nobody would wait.
        """
        token, self._token = self._token, None  # or exchange and graph would hold each other
        return _Wait.apply(self, token, kept)

    def begin(self, xs: Sequence[Tensor], *, dual: bool) -> None:
        """Begins the exchange, or the dual."""
        self._finish = (self._back if dual else self._there)(xs)

    def finish(self) -> tuple[Tensor, ...]:
        """Waits for what the exchange, or the dual, brings."""
        finish, self._finish = self._finish, None
        assert finish is not None, "what was begun is waited for once"
        return finish()


class _Start(torch.autograd.Function):
    """xs -> a token of no elements, for the wait.

    backward  dxs = what the dual exchange brings
    """

    @staticmethod
    def forward(ctx: Any, exchange: AsyncExchange, *xs: Tensor) -> Tensor:
        ctx.exchange = exchange
        # While a replay plays, the wait is given the results, and nothing may be sent.
        if not plays():
            exchange.begin(xs, dual=False)
        return xs[0].new_empty(0)

    @staticmethod
    @first_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        # docs/design.md: head chunks are asynchronous exchanges
        return None, *ctx.exchange.finish()


class _Wait(torch.autograd.Function):
    """The token -> ys, what the exchange brings.

    backward  begins the dual exchange with dys
    """

    @staticmethod
    def forward(ctx: Any, exchange: AsyncExchange, token: Tensor, kept: bool) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        if kept:
            ctx.save_for_backward(token)
        return once(exchange.finish, exchange.num)

    @staticmethod
    @first_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        ctx.exchange.begin(grad_outputs, dual=True)
        return None, grad_outputs[0].new_empty(0), None
