"""How a problem is judged: run on all ranks as it says, and held to the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fuzzing.problem import INPUTS, Problem, strided
from seqpar import Group, Plan, attention, attention_with_lse, shard_sequence, simulate
from seqpar.testing import NAMES, Budget, oracle
from seqpar.testing.budget import max_error
from seqpar_kernels import TENSORS

Results = dict[str, Tensor]  # out, and the gradients that were asked for, of a rank
FACTORS = {"twice": 2.0, "hooked": 2.0}  # of gradients


class WrongResultError(AssertionError):
    """A result that is not what one device gives."""


def judge(problem: Problem) -> None:
    """Returns if all is well.

    Raises:
        WrongResultError: some result of some rank is wrong.
    """
    clean = problem.tensors()
    by_rank = simulate(problem.size, solved, problem, clean)
    case = problem.case
    seen = case.visible()
    budget = _with_magnitudes(Budget.of(*clean, seen, case.terms()), problem, clean, seen)
    _check_exact(problem, budget, by_rank)
    if problem.poisoned is not None:
        name, at = problem.poisoned
        assert problem.poison is not None, "it is poisoned"
        bad = [x.clone() for x in clean]
        bad[INPUTS.index(name)][0, at] = problem.poison.value
        _check_poison(problem, seen, by_rank, simulate(problem.size, solved, problem, bad))


def _with_magnitudes(
    budget: Budget, problem: Problem, tensors: list[Tensor], seen: Tensor
) -> Budget:
    """The budget, and at least some rounding steps of what is summed.

    In float64 huge values cancel in dq and dk. In other types the budget has one step, but where all weights
    are equal (a scale of 0) all roundings of a sum go the same way.
    """
    case = problem.case
    terms = case.terms().changed(torch.Tensor.double)
    wide = [x.double() for x in tensors]
    p = oracle.weights(wide[0], wide[1], seen, terms)
    added = max(seen.shape) * case.hq // case.hkv
    eps = torch.finfo(torch.float64 if case.dtype == torch.float64 else torch.float32).eps
    step = (64 if case.dtype == torch.float64 else added**0.5) * eps
    sums = oracle.magnitudes(*wide, p, terms)
    allowed = (max(a, step * m) for a, m in zip(budget.allowed, sums, strict=True))
    return Budget(budget.expected, tuple(allowed))


def solved(group: Group, problem: Problem, tensors: list[Tensor]) -> Results:
    """Out and gradients of this rank's rows."""
    case, use = problem.case, problem.use
    rows, keys = case.layout(group.size), case.keys(group.size)
    layouts = (rows, keys, keys, rows)
    *mine, dout = (
        strided(shard_sequence(x, of, group.rank), problem.strides)
        for x, of in zip(tensors, layouts, strict=True)
    )
    plan = case.plan(group, problem.strategy, problem.implementation)
    # Copies would be contiguous: a tensor that learns keeps the strides that were drawn.
    leaves = [
        x.detach().requires_grad_(not (use == "frozen" and n == 0)) for n, x in enumerate(mine)
    ]
    if use == "shared":
        leaves = [leaves[0]] * 3
    if use == "summed":
        dout = dout.new_ones(()).expand_as(dout)
    return _used(problem, plan, leaves, dout)


def _used(problem: Problem, plan: Plan, leaves: list[Tensor], dout: Tensor) -> Results:
    use = problem.use
    around: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "no_grad": torch.no_grad, "inference": torch.inference_mode,
    }  # fmt: skip
    with around.get(use, nullcontext)():
        if use == "checkpointed":
            out = checkpoint(attention, *leaves, plan, use_reentrant=False)
        elif use == "with lse":
            out, _ = attention_with_lse(*leaves, plan)
        else:
            out = attention(*leaves, plan)
    results: Results = {"out": out.detach().clone()}
    if use in around:
        return results
    if use == "hooked":
        out.register_hook(lambda g: 2 * g)
    ends, given = [out], [dout]
    if use == "twice":
        ends, given = [*ends, attention(*leaves, plan)], [dout, dout]
    wanted = {
        name: leaf
        for name, leaf in zip(("dq", "dk", "dv"), leaves, strict=True)
        if leaf.requires_grad
    }
    if use == "shared":
        wanted = {"all": leaves[0]}
    learned = plan.score.tensors
    wanted |= {f"d{name}": x for name, x in learned.items() if x.requires_grad}
    grads = torch.autograd.grad(ends, list(wanted.values()), given, retain_graph=use == "retained")
    if use == "retained":
        again = torch.autograd.grad(ends, list(wanted.values()), given)
        for name, x, y in zip(wanted, grads, again, strict=True):
            if not torch.equal(x.nan_to_num(), y.nan_to_num()):
                raise WrongResultError(f"{name} is another when backward is run twice")
    results |= dict(zip(wanted, grads, strict=True))
    for name, x in learned.items():
        if f"d{name}" in results:
            results[f"d{name}"] = x = results[f"d{name}"].clone()
            plan.group.all_reduce_(x, "sum")
    return results


def _check_exact(problem: Problem, budget: Budget, by_rank: list[Results]) -> None:
    case = problem.case
    there = case.learned()
    learned = [
        f"d{n}" for n, of in zip(TENSORS, oracle.LEARNED, strict=True) if there[of] is not None
    ]
    expected = dict(zip((*NAMES, *learned), budget.expected, strict=True))
    allowed = dict(zip((*NAMES, *learned), budget.allowed, strict=True))
    if problem.use == "shared":
        expected["all"] = sum(expected[n] for n in NAMES[1:])
        allowed["all"] = sum(allowed[n] for n in NAMES[1:])
    for rank, results in enumerate(by_rank):
        for name, got in results.items():
            want, bound = expected[name], allowed[name]
            if name not in learned:
                of = case.keys(problem.size) if name in ("dk", "dv") else case.layout(problem.size)
                want = want[:, of.positions(rank)]
            factor = 1.0 if name == "out" else FACTORS.get(problem.use, 1.0)
            off = max_error(got, factor * want)
            if not off <= factor * bound:
                raise WrongResultError(
                    f"{name} on rank {rank} is off by {off:.3g}, allowed {factor * bound:.3g}"
                )


def _check_poison(problem: Problem, seen: Tensor, clean: list[Results], bad: list[Results]) -> None:
    assert problem.poisoned is not None
    assert problem.poison is not None
    name, at = problem.poisoned
    seen = (
        seen[0, 0] if seen.ndim == 4 else seen
    )  # the first batch entry is the one that is poisoned
    rows = torch.arange(seen.shape[0]) == at if name in ("q", "dout") else seen[:, at]
    cols = seen[rows].any(0)
    case, size = problem.case, problem.size
    for rank, (x, y) in enumerate(zip(clean, bad, strict=True)):
        for result in ("out", "dq", "dk", "dv"):
            of_keys = result in ("dk", "dv")
            layout, reached = (case.keys(size), cols) if of_keys else (case.layout(size), rows)
            here = reached[layout.positions(rank)]
            want, got = x[result].clone(), y[result].clone()
            want[:1, here] = got[:1, here] = 0
            # What overflows its type by itself is not finite without the poison too.
            if not ((want == got) | (want.isnan() & got.isnan())).all():
                raise WrongResultError(
                    f"a {problem.poison} reaches {result} on rank {rank} where it is not seen"
                )
    if name == "dout" or case.dropout or not seen[rows].any():
        return
    row = int(rows.nonzero()[0])
    if not seen[row].any() or (name == "q" and problem.poison.value == float("inf")):
        return  # an infinite score has a weight of 0 or 1
    for rank, results in enumerate(bad):
        own = case.layout(size).positions(rank) == row
        if own.any() and torch.isfinite(results["out"][0, own]).all():
            raise WrongResultError(f"a {problem.poison} is lost in out on rank {rank}")
