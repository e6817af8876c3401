"""`run_step`: one forward and backward of a plan, timed and counted."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.calls import Shape, Volume, dry_run, resolve
from seqpar.comm import Group
from seqpar.functional import attention
from seqpar.strategies import Plan


def meet(group: Group, device: torch.device | None = None) -> None:
    """Waits until all ranks are here, before a clock starts."""
    group.all_reduce_(torch.zeros(1, device=device), "sum")


@dataclass(frozen=True)
class Step:
    """What a step computed on this rank, how long it took, what it sent, and what a dry run says."""

    results: tuple[Tensor, ...]  # out, dq, dk, dv, and the gradients of slopes and sinks that learn
    seconds: float
    sent: Volume
    derived: Volume


def run_step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, plan: Plan) -> Step:
    """Attention and its gradients on this rank's rows. All ranks must call.

    The clock starts once all ranks are there, so waiting for a late one is not measured. Resets the
    counters of the group.
    """
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    leaves += [x for x in plan.score.tensors.values() if x.requires_grad]
    meet(plan.group, q.device)
    plan.group.traffic.reset()
    start = time.perf_counter()
    out = attention(leaves[0], leaves[1], leaves[2], plan)
    forward = plan.group.traffic.total
    gradients = torch.autograd.grad(out, leaves, dout)
    seconds = time.perf_counter() - start
    sent = Volume(forward, plan.group.traffic.total - forward)
    learns = tuple(name for name, x in plan.score.tensors.items() if x.requires_grad)
    shape = Shape.of(q, k, v, learns=learns)
    derived = dry_run.sent(resolve(plan, q, v), shape, plan.group.rank)
    return Step((out.detach(), *gradients), seconds, sent, derived)
