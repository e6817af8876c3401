"""All-reduce and its dual: what is summed going forward is merely passed on going back, and vice versa."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqpar.comm.group import Group
from seqpar_kernels import any_order


def all_reduce_(x: Tensor, group: Group) -> None:
    """Replaces `x`, contiguous, by its sum over ranks, in place. Not differentiable.

    Raises:
        TypeError: x is bool, which back-ends sum wrongly without a word.
    """
    if x.dtype == torch.bool:
        raise TypeError("a bool tensor has no sum; reduce an integer one")
    group.all_reduce_(x, "sum")


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks. Its gradient is passed on as it comes: every rank holds the same sum."""
    return _AllReduce.apply(x, group)


def replicate(x: Tensor, group: Group) -> Tensor:
    """`x` itself, which every rank holds alike. Its gradient is the sum of the ranks' gradients."""
    return _Replicate.apply(x, group)


class _AllReduce(torch.autograd.Function):
    """x -> y = sum over ranks of x.    backward  dx = dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        # A clone, because what comes in, be it a gradient, must not be written to.
        total = x.contiguous().clone()
        all_reduce_(total, group)
        return total

    @staticmethod
    @any_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (dy,) = grad_outputs
        # First derivatives need no dual, and autograd would take its view for memory of its own.
        return replicate(dy, ctx.group) if torch.is_grad_enabled() else dy, None


class _Replicate(torch.autograd.Function):
    """x -> y = x.    backward  dx = sum over ranks of dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @any_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad_outputs[0], ctx.group), None
