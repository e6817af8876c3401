"""Gradients of what ranks hold alike: each has its own tokens' share, and one device the sum.

`summed_gradients` is a block of backwards, `backward` a block of one, `sum_gradients` the sum alone.
docs/training.md derives what is summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from seqpar.comm import Group, agreed, all_reduce_
from seqpar.loss import check_reduction, summing_over
from seqpar.replicas import content_hash
from seqpar_kernels import accumulation_dtype
from seqpar_kernels.torch_internals import version

Parameters = nn.Module | Iterable[Tensor]
# What reduces gradients by itself, in backward: by name, to import none of them.
REDUCES = {"DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
# By gradient that `sum_gradients` has written: its version then, and the ranks that it was summed over.
_SUMMED = WeakIdKeyDictionary()
# By parameter: the sets of ranks whose copies of it have been compared.
_COMPARED = WeakIdKeyDictionary()


@contextmanager
def summed_gradients(
    parameters: Parameters, group: Group, *, axes: Sequence[Group] = ()
) -> Iterator[None]:
    """A block of backwards, after which gradients are their sum over ranks: one step. All ranks must enter.

    In it go backward as often as the step has micro-batches; behind it clip, step and `zero_grad()`. What one
    rank raises in it is an error on every rank, and nothing is summed then. What is summed, and how, is said
    at `seqpar.sum_gradients`, which needs not be called then.

    Args:
        parameters: the model, or an iterable of its parameters. A model is also looked at for wrappers.
        group: all ranks that train the model, over whose tokens its loss is the mean.
        axes: the other groups of this rank, if calls run over those and the model is trained by more ranks:
            that which shares its sequence, that which shares its heads. An error is told along each, and so
            to ranks that are in the middle of a call.

    Raises:
        ValueError: there is no parameter, or no gradient behind the block; gradients of an earlier step were
            not set to zero; or in the block a loss is the mean over other ranks, or made for wrappers that
            average, `gradients="mean"`.
        DesyncError: ranks differ in their parameters, or another rank raised, in the block or here.
        NotImplementedError: DDP or FSDP reduce these gradients already; and what `sum_gradients` refuses.
    """
    # docs/design.md: a step is a block
    with (
        agreed(group, operation="summed_gradients") as claim,
        agreed(*axes, operation="summed_gradients"),
    ):
        given = parameters if isinstance(parameters, nn.Module) else list(parameters)
        params = _learning(given)
        claim |= _check(params, group) | _copies(params, group)
        if any(_is_summed(p, group) or _has_gradient(p) for p in params):
            raise ValueError(
                "gradients of an earlier step are there and would be summed once more: zero_grad() before "
                "the next step, and go through all micro-batches of a step in one block"
            )
        with summing_over(group):
            yield
        # Between forward and backward FSDP shows other parameters than those that have the gradients.
        begun = set(params)
        params = _learning(given)
        claim |= _check(params, group)
        # Those that are to learn since the block began.
        claim |= _copies([p for p in params if p not in begun], group)
        _check_gradients(params, group)
    if not _sum(params, group):
        raise ValueError(
            "no parameter has a gradient on any rank: go backward in the block; and give the model, not its "
            "parameters, if FSDP has sharded it"
        )


def backward(
    loss: Tensor, parameters: Parameters, group: Group, *, axes: Sequence[Group] = ()
) -> None:
    """Goes backward from a loss, and replaces the gradients of parameters by their sum over ranks. All call.

    For a step of one micro-batch; those of several go in one block of `seqpar.summed_gradients`, whose
    arguments and errors these are.

    Args:
        loss: this rank's, as `seqpar.mean_loss` gives it.
    """
    with summed_gradients(parameters, group, axes=axes):
        check_reduction(loss)
        loss.backward()


def sum_gradients(parameters: Parameters, group: Group) -> None:
    """Replaces the gradients of replicated parameters by their sum over ranks, in place. All call.

    Once per step, after the last micro-batch: `seqpar.summed_gradients` sees to that. A parameter without a
    gradient here counts as zero, so ranks that saw no token need no care; one that no rank has a gradient for
    keeps none. Gradients of 16 bits are added in float32.

    Of parameters that are sharded over *other* ranks (DTensors of tensor parallelism), shards are added. At
    the first sum of a parameter its copies are compared, to the bit: what ranks do not hold alike, such as
    experts of a mixture, is no copy, and its gradient would become that of all of them.

    Args:
        parameters: the model, or an iterable of its parameters.
        group: the ranks that hold the same parameters: all that train the model, as in `seqpar.mean_loss`; of
            shards, experts and stages of a pipeline those that hold the same ones.

    Raises:
        ValueError: there is no parameter, or gradients are as they were summed before.
        DesyncError: ranks differ in the shapes, dtypes or first content of their parameters, or another rank
            raised.
        NotImplementedError: a gradient is sparse, wants gradients itself, or is of a DTensor that is sharded
            over ranks of the group, which its wrapper reduces; or the model is wrapped by DDP or FSDP.
    """
    with agreed(group, operation="sum_gradients") as claim:
        params = _learning(parameters)
        claim |= _check(params, group) | _copies(params, group)
        _check_gradients(params, group)
    _sum(params, group)


def _learning(parameters: Parameters) -> list[Tensor]:
    """The parameters that want gradients, each once.

    Raises:
        NotImplementedError: a wrapper reduces their gradients.
    """
    if isinstance(parameters, nn.Module):
        names = {kind.__name__ for m in parameters.modules() for kind in type(m).__mro__}
        if wrappers := sorted(names & REDUCES):
            raise NotImplementedError(
                f"{wrappers[0]} reduces gradients itself, in backward: make the loss by "
                "mean_loss(..., gradients='mean'), call loss.backward(), and sum nothing"
            )
        parameters = parameters.parameters()
    return list(dict.fromkeys(p for p in parameters if p.requires_grad))


def _check(params: list[Tensor], group: Group) -> dict[str, object]:
    """The claim of parameters, if their gradients are to be summed over the group at all."""
    if not params:
        raise ValueError(
            "no parameter wants a gradient; model.parameters() is used up by its first use, so call it anew, "
            "or give the model"
        )
    if any(_is_sharded_over(p, group) for p in params):
        raise NotImplementedError(
            "parameters sharded (DTensor) over ranks of the group are reduced in backward by what has "
            "sharded them, such as FSDP; leave the sum out and see mean_loss(gradients=...)"
        )
    return {"parameters": [(tuple(p.shape), p.dtype) for p in params]}


def _copies(params: list[Tensor], group: Group) -> dict[str, object]:
    """The claim of what parameters hold that are summed over these ranks for the first time."""
    # docs/design.md: only copies are summed
    ranks = tuple(group.transport.global_ranks)
    return {
        f"the copy of parameter {n} {tuple(p.shape)}": content_hash(_local(p))
        for n, p in enumerate(params)
        if group.size > 1 and ranks not in _COMPARED.get(p, ())
    }


def _check_gradients(params: list[Tensor], group: Group) -> None:
    """Refuses gradients that cannot be summed, or have been."""
    if any(_is_summed(p, group) for p in params):
        raise ValueError(
            "gradients are as sum_gradients left them: call it once a step, after the last backward, and "
            "zero_grad() before the next step"
        )
    if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
        raise NotImplementedError("sparse gradients are not summed; use nn.Embedding(sparse=False)")
    if any(p.grad is not None and p.grad.requires_grad for p in params):
        raise NotImplementedError(
            "a sum in place has no derivative, but a gradient was made with create_graph=True; detach it "
            "first, or sum what torch.autograd.grad gives with seqpar.comm.all_reduce"
        )


def _sum(params: list[Tensor], group: Group) -> int:
    """How many parameters some rank has a gradient of: those that are summed."""
    ranks = tuple(group.transport.global_ranks)
    for p in params:
        _COMPARED.setdefault(p, set()).add(ranks)
    has = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    all_reduce_(has, group)
    holders = has.tolist()
    for p, num_ranks in zip(params, holders, strict=True):
        if num_ranks:
            over = _summed_over(p)
            grad = _placed(torch.zeros_like(p) if p.grad is None else p.grad, p)
            here = _local(grad)
            wide = here.to(accumulation_dtype(p.dtype)).contiguous()
            all_reduce_(wide, group)
            if here is grad:
                p.grad = wide.to(getattr(p, "grad_dtype", None) or p.dtype)
            else:  # a DTensor, whose shard is written
                here.copy_(wide)
                p.grad = grad
            assert p.grad is not None, "it was set"
            _SUMMED[p.grad] = version(p.grad), over | {ranks}
    return sum(map(bool, holders))


def _local(x: Any) -> Tensor:
    """What this rank holds of a tensor, which may be a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def _has_gradient(p: Tensor) -> bool:
    """Whether there is a gradient other than zero; or one that is sparse, which is refused anyway."""
    grad = p.grad
    return grad is not None and (grad.layout != torch.strided or bool(_local(grad).any()))


def _is_summed(p: Tensor, group: Group) -> bool:
    """Whether its gradient is as it was summed over these ranks."""
    return group.size > 1 and tuple(group.transport.global_ranks) in _summed_over(p)


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
