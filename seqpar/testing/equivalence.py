"""Runs a case on one rank and says how far its rows are from one-device attention."""

from __future__ import annotations

from dataclasses import dataclass

from seqpar.calls import Volume
from seqpar.comm import Group
from seqpar.testing.budget import Budget, max_error
from seqpar.testing.case import NAMES, Case
from seqpar.testing.step import run_step
from seqpar_kernels import Implementation


@dataclass(frozen=True)
class Errors:
    """Largest absolute errors on one rank, what was allowed, and what the rank sent."""

    found: dict[str, float]
    allowed: dict[str, float]
    sent: Volume
    derived: Volume

    @property
    def failures(self) -> list[str]:
        """What is out of bounds, in words; empty when all is well."""
        wrong = [
            f"{name} off by {self.found[name]:.3g}, allowed {self.allowed[name]:.3g}"
            for name in self.found
            if not self.found[name] <= self.allowed[name]
        ]
        if self.sent != self.derived:
            wrong.append(f"sent {self.sent}, by a dry run {self.derived}")
        return wrong


def errors_on_rank(
    group: Group,
    case: Case,
    strategy: str,
    implementation: Implementation | None = None,
    budget: Budget | None = None,
    device: str = "cpu",
) -> Errors:
    """Forward and backward of this rank's rows, compared with the oracle. All ranks must call.

    Args:
        budget: of this case, where the caller has it already.
        device: where the attention runs; it is judged on the CPU.
    """
    rows, cols = (x.positions(group.rank) for x in (case.layout(group.size), case.keys(group.size)))
    mine = dict(zip(NAMES, (rows, rows, cols, cols), strict=True))
    held = rows, cols, cols, rows
    q, k, v, dout = (x[:, at].to(device) for x, at in zip(case.tensors(), held, strict=True))
    step = run_step(q, k, v, dout, case.plan(group, strategy, implementation, device))

    budget = budget or case.budget()
    found = {}
    for name, got, expected in zip(case.names, step.results, budget.expected, strict=True):
        if name in NAMES and got.dtype != case.dtype:
            raise AssertionError(f"{name} must be {case.dtype}, got {got.dtype}")
        if name not in NAMES:  # this rank's share
            got = got.clone()
            group.all_reduce_(got, "sum")
        found[name] = max_error(got.cpu(), expected[:, mine[name]] if name in mine else expected)
    allowed = dict(zip(case.names, budget.allowed, strict=True))
    return Errors(found, allowed, step.sent, step.derived)
