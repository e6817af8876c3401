"""Losses and gradients over ranks that hold other tokens: P ranks get what one device would have.

The mean is over the tokens of all ranks that train one model: those that share a sequence, and those of
every data-parallel replica. docs/training.md derives what is summed, and what is divided by what.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from seqpar.comm import Group, agreed, all_reduce, all_reduce_
from seqpar.replicas import content_hash
from seqpar_kernels import accumulation_dtype, any_order
from seqpar_kernels.torch_internals import version

Reduction = Literal["sum", "mean"]
# By gradient that `sum_gradients` has written: its version then, and the ranks that it was summed over.
_SUMMED = WeakIdKeyDictionary()
# By parameter: the sets of ranks whose copies of it have been compared.
_COMPARED = WeakIdKeyDictionary()


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
            negative or no single number, or gradients is neither "sum" nor "mean".
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
    return mean if gradients == "sum" else gradient_times(mean, group.size)


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


def sum_gradients(parameters: Iterable[Tensor], group: Group) -> None:
    """Replaces the gradients of replicated parameters by their sum over ranks, in place. All call.

    Once per step, after the last micro-batch. A parameter without a gradient here counts as zero, so
    ranks that saw no token need no care; one that no rank has a gradient for keeps none. Gradients of
    16 bits are added in float32.

    Of parameters that are sharded over *other* ranks (DTensors of tensor parallelism), shards are added. At
    the first sum of a parameter its copies are compared, to the bit: what ranks do not hold alike, such as
    experts of a mixture, is no copy, and its gradient would become that of all of them.

    Args:
        group: the ranks that hold the same parameters: all that train the model, as in `seqpar.mean_loss`; of
            shards, experts and stages of a pipeline those that hold the same ones.

    Raises:
        ValueError: there is no parameter, or gradients are as they were summed before.
        DesyncError: ranks differ in the shapes, dtypes or first content of their parameters, or another rank
            raised.
        NotImplementedError: a gradient is sparse, wants gradients itself, or is of a DTensor that is sharded
            over ranks of the group, which its wrapper reduces.
    """
    params = list(dict.fromkeys(p for p in parameters if p.requires_grad))
    with agreed(group, operation="sum_gradients") as claim:
        claim["parameters"] = [(tuple(p.shape), p.dtype) for p in params]
        if not params:
            raise ValueError(
                "sum_gradients got no parameter that wants a gradient; model.parameters() is used up by its "
                "first use, so call it anew"
            )
        ranks = tuple(group.transport.global_ranks)
        if group.size > 1 and any(ranks in _summed_over(p) for p in params):
            raise ValueError(
                "gradients are as sum_gradients left them: call it once a step, after the last backward, and "
                "zero_grad() before the next step"
            )
        if any(_is_sharded_over(p, group) for p in params):
            raise NotImplementedError(
                "parameters sharded (DTensor) over ranks of the group are reduced in backward by what has "
                "sharded them, such as FSDP; leave sum_gradients out and see mean_loss(gradients=...)"
            )
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise NotImplementedError(
                "sparse gradients are not summed; use nn.Embedding(sparse=False)"
            )
        if any(p.grad is not None and p.grad.requires_grad for p in params):
            raise NotImplementedError(
                "a sum in place has no derivative, but a gradient was made with create_graph=True; detach it "
                "first, or sum what torch.autograd.grad gives with seqpar.comm.all_reduce"
            )
        # docs/design.md: only copies are summed
        for n, p in enumerate(params):
            if group.size > 1 and ranks not in _COMPARED.get(p, ()):
                claim[f"the copy of parameter {n} {tuple(p.shape)}"] = content_hash(_local(p))
    for p in params:
        _COMPARED.setdefault(p, set()).add(ranks)
    has = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    all_reduce_(has, group)
    for p, num_ranks in zip(params, has.tolist(), strict=True):
        if num_ranks:
            over = _summed_over(p)
            grad = _placed(torch.zeros_like(p) if p.grad is None else p.grad, p)
            here = _local(grad)
            wide = here.to(accumulation_dtype(p.dtype)).contiguous()
            all_reduce_(wide, group)
            if here is grad:
                p.grad = wide.to(p.dtype)
            else:  # a DTensor, whose shard is written
                here.copy_(wide)
                p.grad = grad
            assert p.grad is not None, "it was set"
            _SUMMED[p.grad] = version(p.grad), over | {ranks}


def _local(x: Any) -> Tensor:
    """What this rank holds of a tensor, which may be a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def _summed_over(p: Tensor) -> frozenset[tuple[int, ...]]:
    """Over which ranks a gradient has been summed since it was last added to."""
    if p.grad is None:
        return frozenset()
    count, over = _SUMMED.get(p.grad, (-1, frozenset()))
    return over if count == version(p.grad) else frozenset()


def _is_sharded_over(p: Any, group: Group) -> bool:
    """Whether a parameter is a DTensor of a mesh that has other ranks of the group."""
    if not hasattr(p, "full_tensor") or group.size == 1:
        return False
    ranks = group.transport.global_ranks
    others = {rank for rank in ranks if rank != ranks[group.rank]}
    return not others.isdisjoint(p.device_mesh.mesh.flatten().tolist())


def _placed(grad: Any, p: Any) -> Any:
    """The gradient, sharded as its parameter; ranks of its mesh may still have parts to add."""
    if not hasattr(grad, "full_tensor") or grad.placements == p.placements:
        return grad
    return grad.redistribute(placements=p.placements)


def gradient_times(x: Tensor, factor: float) -> Tensor:
    """Gives x, and its gradient times a factor."""
    return _GradientTimes.apply(x, factor)


class _GradientTimes(torch.autograd.Function):
    """x -> y = x.    backward  dx = factor dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
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
