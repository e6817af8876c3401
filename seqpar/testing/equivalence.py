"""Runs a case on one rank and says how far its rows are from one-device attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqpar.comm import Count, Group
from seqpar.functional import attention
from seqpar.strategies import VOLUMES, Plan, Shape, Strategy, Volume
from seqpar.testing.budget import Budget, max_error
from seqpar.testing.case import NAMES, Case
from seqpar_kernels import Implementation, Score


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors on one rank, what was allowed, and what the rank sent."""

    found: dict[str, float]
    allowed: dict[str, float]
    sent: Volume
    formula: Volume

    @property
    def failures(self) -> list[str]:
        """What is out of bounds, in words; empty when all is well."""
        wrong = [
            f"{name} off by {self.found[name]:.3g}, allowed {self.allowed[name]:.3g}"
            for name in NAMES
            if not self.found[name] <= self.allowed[name]
        ]
        if self.sent != self.formula:
            wrong.append(f"sent {self.sent}, formula {self.formula}")
        return wrong


def errors_on_rank(
    group: Group,
    case: Case,
    strategy: Strategy,
    implementation: Implementation | None = None,
    budget: Budget | None = None,
) -> Errors:
    """Forward and backward of this rank's rows, compared with the oracle. All ranks must call.

    Args:
        budget: of this case, where the caller has it already.
    """
    layout = case.layout(group.size)
    mine = layout.positions(group.rank)
    *whole, dout = case.tensors()
    q, k, v = (x[:, mine].requires_grad_() for x in whole)
    plan = Plan(group, layout, case.mask, Score(case.scale), strategy, implementation)

    group.traffic.reset()
    out = attention(q, k, v, plan)
    forward = group.traffic.total
    gradients = torch.autograd.grad(out, (q, k, v), dout[:, mine])
    sent = Volume(forward, group.traffic.total - forward)

    budget = budget or case.budget()
    results = dict(zip(NAMES, (out.detach(), *gradients), strict=True))
    for name, x in results.items():
        if x.dtype != case.dtype:
            raise AssertionError(f"{name} must be {case.dtype}, got {x.dtype}")
    found = {
        name: max_error(x, expected[:, mine])
        for (name, x), expected in zip(results.items(), budget.expected, strict=True)
    }
    formula = VOLUMES[strategy](layout, group.rank, Shape.of(q, k, v))
    if group.size == 1:
        formula = Volume(Count(), Count())
    return Errors(found, dict(zip(NAMES, budget.allowed, strict=True)), sent, formula)
