"""Losses over ranks that hold other tokens: P ranks get what one device would have.

The mean is over the tokens of all ranks that train one model: those that share a sequence, and those of
every data-parallel replica. docs/training.md derives what is summed, and what is divided by what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from seqpar.comm import Group, agreed, all_reduce, all_reduce_
from seqpar_kernels import accumulation_dtype, any_order

Reduction = Literal["sum", "mean"]
# By loss: the group over which it is the mean, and how gradients become one.
_REDUCED = WeakIdKeyDictionary()
# The groups over which gradients will be summed: of the blocks that are open.
_SUMMING: ContextVar[tuple[Group, ...]] = ContextVar("summing", default=())


def mean_loss(
    token_losses: Float[Tensor, "*tokens"],
    group: Group,
    *,
    valid: Bool[Tensor, "*tokens"] | None = None,
    num_tokens: Int[Tensor, ""] | int | None = None,
    gradients: Reduction = "sum",
) -> Float[Tensor, ""]:
    """The mean over the valid tokens of all ranks, the same on every rank. All ranks must call.

    A rank may hold no valid token, or no token; if nobody has one the mean is 0. Each rank's backward
    gives its own tokens' part of the gradient of that mean, so the gradients of one device are the
    *sum* over the ranks of the group, which `seqpar.sum_gradients` takes.

    Args:
        token_losses: the loss of every token of this rank, not yet reduced, any shape.
        group: all ranks that train the model. With data parallelism these are the ranks of all
            replicas, not only those that share this rank's sequences.
        valid: which of them count; by default all. Losses that do not count may be NaN.
        num_tokens: what the sum over tokens is divided by; by default the valid tokens of this call on
            all ranks. With gradient accumulation the tokens of all micro-batches, from
            `seqpar.count_tokens`: the results of the micro-batches then add up to the mean, and so do
            the gradients. Less than 1 counts as 1.
        gradients: how the ranks' gradients become one: "sum", or "mean" under wrappers that average over
            the ranks of the group, as DDP and FSDP do unless told otherwise. With "mean" the gradient is
            `group.size` times larger; the loss itself is the same.

    Raises:
        ValueError: token_losses is one number, valid has another shape than token_losses, num_tokens is
            negative or no single number, or gradients is neither "sum" nor "mean"; or in a block of
            `seqpar.summed_gradients` it is "mean", or the group has other ranks.
        TypeError: valid is not bool.
        DesyncError: ranks differ in dtype or options, or another rank raised.
    """
    with agreed(group, operation="mean_loss") as claim:
        claim |= {"dtype": token_losses.dtype, "gradients": gradients}
        # The value of a tensor is not compared: reading it would wait for the device.
        claim["num_tokens"] = "a tensor" if isinstance(num_tokens, Tensor) else num_tokens
        if token_losses.ndim == 0:
            raise ValueError(
                "token_losses must be the loss of each token, got one number; take reduction='none'"
            )
        _check_valid(valid, token_losses)
        _check_options(num_tokens, gradients)
        if token_losses.requires_grad and torch.is_grad_enabled():
            check_sum(group, gradients)
    wide = accumulation_dtype(token_losses.dtype)
    counted = token_losses if valid is None else token_losses.masked_fill(~valid, 0.0)
    if num_tokens is None:
        count = _count([token_losses if valid is None else valid], token_losses.device)
        all_reduce_(count, group)
    else:
        count = torch.as_tensor(num_tokens, device=token_losses.device)
    total = all_reduce(counted.sum(dtype=wide), group)
    mean = total / count.clamp(min=1).to(wide)
    # docs/design.md: `mean_loss` sums gradients, not averages
    loss = mean if gradients == "sum" else gradient_times(mean, group.size)
    _REDUCED[loss] = group, gradients
    return loss


@contextmanager
def summing_over(group: Group) -> Iterator[None]:
    """A block after which gradients are summed over a group; losses that are not meant so are refused."""
    token = _SUMMING.set((*_SUMMING.get(), group))
    try:
        yield
    finally:
        _SUMMING.reset(token)


def check_reduction(loss: Tensor) -> None:
    """Refuses a result of `mean_loss` whose gradients are not meant to be summed as they will be.

    Raises:
        ValueError: it is the mean over other ranks, or was made for wrappers that average.
    """
    if loss in _REDUCED:
        group, gradients = _REDUCED[loss]
        check_sum(group, gradients)


def check_sum(group: Group, gradients: Reduction) -> None:
    """Refuses a loss over a group whose gradients are not meant to be summed as the open blocks do.

    Raises:
        ValueError: as `check_reduction`.
    """
    summed = [sorted(x.transport.global_ranks) for x in _SUMMING.get()]
    ranks = sorted(group.transport.global_ranks)
    if summed and ranks not in summed:
        over = " and over ".join(map(str, summed))
        raise ValueError(
            f"the loss is the mean over the tokens of ranks {ranks}, but gradients are summed over {over}: "
            "give both the group of all ranks that train the model; of what fewer ranks hold alike, such as "
            "experts, open another block in that block"
        )
    if summed and gradients == "mean" and group.size > 1:
        raise ValueError(
            "gradients='mean' is for wrappers that average, such as DDP; gradients that are summed would be "
            f"{group.size} times too large"
        )


def count_tokens(
    valid: Bool[Tensor, "..."] | Iterable[Bool[Tensor, "..."]], group: Group
) -> Int[Tensor, ""]:
    """How many tokens count, over all ranks and all micro-batches of a step. All ranks must call.

    For `num_tokens` of `seqpar.mean_loss`, before the first micro-batch goes forward.

    Args:
        valid: which tokens of this rank count: one tensor, or one for each micro-batch.
        group: all ranks that train the model.

    Raises:
        ValueError: there is no tensor at all.
        TypeError: a tensor is not bool.
        DesyncError: ranks have different numbers of micro-batches, or another rank raised.
    """
    with agreed(group, operation="count_tokens") as claim:
        batches = [valid] if isinstance(valid, Tensor) else list(valid)
        claim["micro-batches"] = len(batches)
        if not batches:
            raise ValueError("count_tokens needs at least one tensor, got none")
        for x in batches:
            if x.dtype != torch.bool:
                raise TypeError(f"valid must be bool, got {x.dtype}")
    count = _count(batches, batches[0].device)
    all_reduce_(count, group)
    return count


def gradient_times(x: Tensor, factor: float | Tensor) -> Tensor:
    """Gives x, and its gradient times a factor."""
    return _GradientTimes.apply(x, factor)


class _GradientTimes(torch.autograd.Function):
    """x -> y = x.    backward  dx = factor dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @any_order
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.factor, None


def _count(tensors: list[Tensor], device: torch.device) -> Int[Tensor, ""]:
    """How many elements are True, or of tensors that are no masks how many there are."""
    counts = [x.sum() if x.dtype == torch.bool else torch.tensor(x.numel()) for x in tensors]
    return torch.stack([count.to(device) for count in counts]).sum()


def _check_valid(valid: Tensor | None, token_losses: Tensor) -> None:
    if valid is None:
        return
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    if valid.shape != token_losses.shape:
        raise ValueError(
            "valid must have the shape of token_losses, "
            f"got {tuple(valid.shape)} for {tuple(token_losses.shape)}"
        )


def _check_options(num_tokens: Tensor | int | None, gradients: str) -> None:
    if gradients not in get_args(Reduction):
        raise ValueError(f"gradients must be one of {get_args(Reduction)}, got {gradients!r}")
    if isinstance(num_tokens, Tensor) and num_tokens.ndim:
        raise ValueError(f"num_tokens must be one number, got {tuple(num_tokens.shape)}")
    if num_tokens is not None and not isinstance(num_tokens, Tensor) and num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative, got {num_tokens}")
