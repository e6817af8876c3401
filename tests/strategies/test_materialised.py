"""Attention over a stored score matrix equals one device however it is sharded; so do the weights.

In float64 only the order of summation may differ (1e-11). What each rank sent equals a dry run.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqpar.calls import Shape, Volume, dry_run, resolve
from seqpar.comm import simulate
from seqpar.layout import LAYOUTS, Layout, Span
from seqpar.strategies.materialised import (
    SHARDINGS,
    attention_weights,
    materialised_attention,
)
from seqpar.testing import NAMES, Case, oracle
from seqpar.testing.budget import EXACT, max_error
from seqpar.testing.drawn import ALL_TERMS, cases, examples

STRATEGIES = pytest.mark.parametrize("strategy", SHARDINGS)
SIZES = st.integers(1, 5)
EVERYTHING = {"alibi": True, "sinks": True, "dropout": 0.5, "softcap": 5.0}


def shorter(case):
    length, kv_length = (n and min(n, 50) for n in (case.length, case.kv_length))
    ends = length, length if kv_length is None else kv_length
    return replace(
        case, length=length, kv_length=kv_length, documents=cut_off(case.documents, ends),
        shown=case.shown and shown_up_to(case.shown, ends),
        by_row=tuple(shown_up_to(each, ends) for each in case.by_row),
    )  # fmt: skip


def cut_off(documents, ends):
    """The boundaries, or a pair of them, of sequences that end sooner."""
    if documents and isinstance(documents[0], tuple):
        return tuple(cut_off(x, (end,)) for x, end in zip(documents, ends, strict=True))
    return documents and tuple(min(b, ends[0]) for b in documents)


def shown_up_to(expression, ends):
    """The expression, whose documents end where the sequence does."""
    kind, *rest = expression
    if kind in ("and", "or"):
        return kind, *(shown_up_to(x, ends) for x in rest)
    return (kind, cut_off(rest[0], ends)) if kind == "documents" else expression


CASES = cases(terms=ALL_TERMS).map(shorter)
EXACT_CASES = cases(st.just(torch.float64), ALL_TERMS).map(shorter)


@st.composite
def problems(draw):
    """A case, how to cut its queries and its keys, and for how many ranks."""
    case, size = draw(EXACT_CASES), draw(SIZES)

    def cuts(length):
        inner = st.lists(st.integers(0, length), min_size=size - 1, max_size=size - 1)
        return st.sampled_from(list(LAYOUTS)) | inner.map(lambda x: (0, *sorted(x), length))

    return case, draw(cuts(case.length)), draw(cuts(num_keys(case))), size


def num_keys(case):
    return case.length if case.kv_length is None else case.kv_length


def layout(cut, length, size):
    """A layout of the package by its name, or runs between borders."""
    if isinstance(cut, str):
        return LAYOUTS[cut](length, size)
    runs = [Span(a, b - a) for a, b in zip(cut[:-1], cut[1:], strict=True)]
    return Layout("cut", length, size, tuple((run,) if run.length else () for run in runs))


def check_volume(group, plan, forward, q, k, v):
    sent = Volume(forward, group.traffic.total - forward)
    assert sent == dry_run.sent(
        plan, Shape.of(q, k, v, learns=tuple(plan.score.tensors)), group.rank
    )


def total(group, share):
    share = share.clone()
    group.all_reduce_(share, "sum")
    return share


def check_case(group, case, strategy, implementation, budget):
    plan = case.plan(group, strategy, implementation)
    mine, keys = (x.positions(group.rank) for x in (plan.layout, plan.keys))
    held = dict(zip(NAMES, (mine, mine, keys, keys), strict=True))
    at = mine, keys, keys, mine
    q, k, v, dout = (x[:, rows] for x, rows in zip(case.tensors(), at, strict=True))
    plan = resolve(plan, q, v)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    learned = [*plan.score.tensors.values()]
    out, _ = materialised_attention(q, k, v, plan)
    forward = group.traffic.total
    found = out.detach(), *torch.autograd.grad(out, leaves + learned, dout)
    check_volume(group, plan, forward, q, k, v)
    for name, got, want, allowed in zip(
        case.names, found, budget.expected, budget.allowed, strict=True
    ):
        if name in held:
            assert got.dtype == case.dtype
            error = max_error(got, want[:, held[name]])
        else:
            error = max_error(total(group, got), want)
        assert error <= allowed, f"{name} off by {error:.3g}, allowed {allowed:.3g}"


@STRATEGIES
@given(case=CASES, size=SIZES)
@settings(max_examples=examples(0.35))
@example(Case(33, 4, 2, kind="zigzag", **EVERYTHING), 3)
@example(Case(33, 4, 2, vd=3, batch=2, kind="striped", dtype=torch.bfloat16, **EVERYTHING), 4)
@example(Case(40, 2, 1, d=8, dtype=torch.float16, **EVERYTHING), 3)
@example(Case(3, 2, 1, d=3, vd=1, **EVERYTHING), 5)
@example(Case(0, **EVERYTHING), 2)
@example(Case(20, 4, 2, kv_length=31, kind="striped", dtype=torch.float32, **EVERYTHING), 3)
@example(Case(24, causal=False, window=4, kind="striped", documents=(0, 0, 8, 16, 24)), 3)
def test_equals_one_device(strategy, case, size):
    simulate(size, check_case, case, strategy, None, case.budget())


@STRATEGIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_one_device_with_triton(strategy, dtype):
    case = Case(19, 4, 2, vd=8, dtype=dtype, **EVERYTHING)
    simulate(2, check_case, case, strategy, "triton", case.budget())


def expected(case, dlse):
    """(q, k, v, dout), what they give and its gradients by autograd, float64, whole; the weights."""
    q, k, v, dout = case.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    terms = case.terms().changed(torch.Tensor.requires_grad_)
    seen = case.visible()
    out = oracle.attention(q, k, v, seen, terms)
    s = oracle.scores(q, k, terms)
    hidden = s.new_full((*s.shape[:3], 1), -torch.inf)
    sink = hidden if terms.sinks is None else terms.sinks[:, None, None].expand_as(hidden)
    s = torch.cat((s.masked_fill(~seen, -torch.inf), sink), -1)
    empty = (s == -torch.inf).all(-1)
    lse = torch.logsumexp(torch.where(empty[..., None], 0.0, s), -1)
    lse = torch.where(empty, -torch.inf, lse).transpose(1, 2)
    loss = (out * dout).sum() + (lse * dlse).masked_fill(empty.transpose(1, 2), 0.0).sum()
    grads = torch.autograd.grad(loss, leaves + terms.learned, allow_unused=True)
    grads = [
        torch.zeros_like(x) if g is None else g
        for g, x in zip(grads, leaves + terms.learned, strict=True)
    ]
    whole = [x.detach() for x in (q, k, v, dout)]
    return whole, (out.detach(), lse.detach(), *grads), oracle.weights(q, k, seen, terms).detach()


def check_problem(group, case, rows, cols, strategy, dlse, answers):
    plan = replace(case.plan(group, strategy), layout=rows, kv_layout=cols)
    (q, k, v, dout), (out, lse, dq, dk, dv, *shared), weights = answers
    mine, keys = rows.positions(group.rank), cols.positions(group.rank)
    leaves = [x.requires_grad_() for x in (q[:, mine], k[:, keys], v[:, keys])]
    plan = resolve(plan, leaves[0], leaves[2])
    learned = [*plan.score.tensors.values()]
    found = materialised_attention(*leaves, plan)
    forward = group.traffic.total
    grads = torch.autograd.grad(found, leaves + learned, (dout[:, mine], dlse[:, mine]))
    check_volume(group, plan, forward, *leaves)

    want = [out[:, mine], lse[:, mine], dq[:, mine], dk[:, keys], dv[:, keys], *shared]
    got = [*found, *grads[:3], *(total(group, g) for g in grads[3:])]
    for n, (x, y) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(
            x.detach(), y, rtol=EXACT, atol=EXACT, msg=lambda m, n=n: f"result {n}: {m}"
        )

    p = attention_weights(*leaves[:2], plan)
    here = {
        "materialised_rows": weights[:, :, mine],
        "materialised_columns": weights[..., keys],
        "materialised_depth": weights,
    }
    torch.testing.assert_close(p, here[strategy], rtol=EXACT, atol=EXACT)


@STRATEGIES
@given(problem=problems())
@settings(max_examples=examples(0.4))
@example((Case(20, 4, 2, kv_length=31, **EVERYTHING), "striped", "zigzag", 3))
@example((Case(20, 2, 1, d=3, vd=2, causal=False, **EVERYTHING), (0, 0, 3, 20), "striped", 3))
@example((Case(5, causal=False, sinks=True, kv_length=0), "contiguous", "contiguous", 2))
def test_cross_attention_its_lse_and_its_weights_equal_one_device(strategy, problem):
    """Keys of another length and layout, gradients through lse too, ranks without rows or without keys."""
    case, row_cut, col_cut, size = problem
    rows, cols = layout(row_cut, case.length, size), layout(col_cut, num_keys(case), size)
    dlse = torch.linspace(-1, 1, case.batch * case.length * case.hq, dtype=torch.float64)
    dlse = dlse.view(case.batch, case.length, case.hq)
    answers = expected(case, dlse)
    simulate(size, check_problem, case, rows, cols, strategy, dlse, answers)


@STRATEGIES
def test_the_gradient_of_lse_alone(strategy):
    """A loss may use lse and not out, or out and not lse."""

    def on_rank(group):
        case = Case(9)
        plan = case.plan(group, strategy)
        q, k, v, _ = (x[:, plan.layout.positions(group.rank)] for x in case.tensors())
        leaves = [x.requires_grad_() for x in (q, k, v)]
        _, lse = materialised_attention(*leaves, plan)
        dq, dk, dv = torch.autograd.grad(lse.sum(), leaves)
        return lse.detach(), dq, dk, dv

    (lse, *grads), others = simulate(1, on_rank)[0], simulate(3, on_rank)
    for x, shards in zip((lse, *grads), zip(*others, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(shards, 1), x, rtol=EXACT, atol=EXACT)
    assert not grads[2].any()
