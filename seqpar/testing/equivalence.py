"""Runs a case on one rank and says how far its rows are from one-device attention."""

from __future__ import annotations

from dataclasses import dataclass

from seqpar.comm import Group
from seqpar.strategies import Plan, Strategy, Volume
from seqpar.testing.budget import Budget, max_error
from seqpar.testing.case import NAMES, Case
from seqpar.testing.step import run_step
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
    q, k, v, dout = (x[:, mine] for x in case.tensors())
    plan = Plan(group, layout, case.mask, Score(case.scale), strategy, implementation)
    step = run_step(q, k, v, dout, plan)

    budget = budget or case.budget()
    found = {}
    for name, got, expected in zip(NAMES, step.results, budget.expected, strict=True):
        if got.dtype != case.dtype:
            raise AssertionError(f"{name} must be {case.dtype}, got {got.dtype}")
        found[name] = max_error(got, expected[:, mine])
    allowed = dict(zip(NAMES, budget.allowed, strict=True))
    return Errors(found, allowed, step.sent, step.formula)
