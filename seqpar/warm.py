"""`warm_up`: compiles and connects what a call needs, before the first step."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar.calls import check_call
from seqpar.comm import Group, agreed, silent
from seqpar.functional import attention, attention_with_lse, cast_by_autocast
from seqpar.strategies import STRATEGIES, Plan


def warm_up(
    q: Float[Tensor, "b sl hq d"],
    k: Float[Tensor, "b slk hkv d"],
    v: Float[Tensor, "b slk hkv vd"],
    plan: Plan,
    *,
    with_lse: bool = False,
) -> None:
    """Compiles and connects all that a forward and a backward of such a call need. All ranks must call.

    First every rank runs its own part over messages that are not sent, so that kernels are compiled and
    memory is there: what fails then is raised on all ranks, and none waits for another. Then all make one
    real call, which connects them. What is sent counts in the group's traffic.

    Args:
        q, k, v: like those of the first step: shapes, type and device matter, values do not. They get no
            gradient.
        with_lse: whether lse will be asked for, as by `attention_with_lse`.

    Raises:
        TypeError, ValueError, NotImplementedError, DesyncError: as `attention` does.
        Exception: what failed, such as a kernel that does not compile; a DesyncError on the other ranks.
    """
    if not isinstance(plan, Plan) or not isinstance(plan.group, Group):
        raise TypeError(f"warm_up takes a seqpar.Plan with a seqpar.Group, got {plan!r}")
    with agreed(plan.group, operation="warm_up"):
        q_c, k_c, v_c = cast_by_autocast(q, k, v)
        resolved = check_call(q_c, k_c, v_c, plan, with_lse=with_lse)
        if plan.group.size > 1:
            _alone(q_c, k_c, v_c, resolved, with_lse=with_lse)
    leaves, tensors = _leaves(q, k, v, plan)
    with torch.enable_grad():
        # The plan itself where it can be: it remembers what it has decided.
        call = replace(plan, score=plan.score.with_tensors(tensors)) if tensors else plan
        attend = attention_with_lse if with_lse else attention
        results = attend(leaves[0], leaves[1], leaves[2], call)
        ends = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(ends, leaves, [torch.zeros_like(x) for x in ends])


def _alone(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, with_lse: bool) -> None:
    """Runs this rank's part, forward and backward, over messages that nobody sends."""
    group = silent(plan.group.rank, plan.group.size)
    leaves, tensors = _leaves(q, k, v, plan)
    plan = plan.on(group, tensors)
    with torch.enable_grad():
        results = STRATEGIES[plan.strategy].attend(
            leaves[0], leaves[1], leaves[2], plan, with_lse=with_lse
        )
        ends = [x for x in results[: 1 + with_lse] if x is not None]
        torch.autograd.grad(ends, leaves, [torch.zeros_like(x) for x in ends])


def _leaves(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(zeros like q, k, v and what learns, all of which want gradients; the tensors of the score)."""
    tensors = {
        name: x.detach().clone().requires_grad_(x.requires_grad)
        for name, x in plan.score.tensors.items()
    }
    leaves = [torch.zeros_like(x).requires_grad_() for x in (q, k, v)]
    return [*leaves, *(x for x in tensors.values() if x.requires_grad)], tensors
