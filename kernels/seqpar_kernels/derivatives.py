"""How often a backward may be differentiated: each one of this project says so, by one of two decorators.

torch's `once_differentiable` refuses too late and not always: it returns constants where the incoming
gradient is one, as that of `out.sum()` is, and a second derivative is then dropped without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Orders = Literal["first", "any"]
Backward = Callable[..., Any]


def first_only(backward: Backward) -> Backward:
    """A backward that is refused as soon as it runs with `create_graph=True`, before anything is sent."""

    @wraps(backward)
    def refusing(*args: Any) -> Any:
        # docs/design.md: second derivatives are right or refused
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "attention over ranks, its exchanges, its kernels and what is computed in tiles give first "
                "derivatives only, but backward ran with create_graph=True; leave that out, or attend with "
                "torch's own attention, and without tiles, where second derivatives (a gradient penalty, a "
                "Hessian) are wanted"
            )
        return backward(*args)

    return _marked(refusing, "first")


def any_order(backward: Backward) -> Backward:
    """A backward made of differentiable operations alone, such as the dual of its forward; as it is."""
    return _marked(backward, "any")


def orders_of(backward: Backward) -> Orders | None:
    """Which derivatives a backward gives; `None` if it does not say so."""
    return getattr(backward, "seqpar_orders", None)


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation is under way with this tensor; ops would drop it in silence."""
    return forward_ad.unpack_dual(x).tangent is not None


def _marked(backward: Backward, orders: Orders) -> Backward:
    backward.seqpar_orders = orders  # type: ignore[attr-defined]
    return backward
