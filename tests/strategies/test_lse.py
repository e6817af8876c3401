"""lse as a result of its own: exact, differentiable, and what parts of the keys are merged by.

A failure in `merge` alone means its weights; in every strategy alike, delta - dlse in the kernels.
"""

import pytest
import torch

import seqpar
from seqpar import Mask, Plan, simulate
from seqpar.calls import Shape, Volume, dry_run, resolve
from seqpar.strategies import STRATEGIES
from seqpar.testing import Case, oracle

EXACT = {"rtol": 1e-11, "atol": 1e-11}
CASES = {
    "zigzag": Case(33, 4, 2, d=4, vd=3, kind="zigzag", degree=1),
    "every term": Case(
        26, 6, 2, d=4, vd=4, batch=2, kind="striped", softcap=5.0, alibi=True, sinks=True, degree=1
    ),
    "rows that see nothing": Case(20, 2, 1, d=4, vd=4, kv_length=9, window=4, degree=1),
    "fewer rows than ranks": Case(2, 3, 3, d=4, vd=4, causal=False, degree=2),
}


def dense(case, dlse):
    """(out, lse, gradients) of one device, where the gradient of lse is `dlse` too."""
    q, k, v, dout = case.tensors()
    terms = case.terms().changed(torch.Tensor.requires_grad_)
    leaves = [*(x.requires_grad_() for x in (q, k, v)), *terms.learned]
    seen = oracle.visible(case.length, case.causal, case.window, None, case.kv_length, case.align)
    s = oracle.scores(q, k, terms).masked_fill(~seen, -torch.inf)
    if (sinks := terms.sinks) is not None:
        s = torch.cat((s, sinks[:, None, None].expand(*s.shape[:3], 1)), -1)
    blind = (s == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(s.masked_fill(blind, 0.0), -1).masked_fill(blind[..., 0], -torch.inf)
    lse = lse.transpose(1, 2)
    out = oracle.attention(q, k, v, seen, terms)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    gradients = torch.autograd.grad((out * dout).sum() + (finite * dlse).sum(), leaves)
    return out, lse, gradients


def on_each_rank(group, case, strategy, dlse):
    rows, cols = (x.positions(group.rank) for x in (case.layout(group.size), case.keys(group.size)))
    q, k, v, dout = (
        x[:, at] for x, at in zip(case.tensors(), (rows, cols, cols, rows), strict=True)
    )
    plan = case.plan(group, strategy)
    learned = [*plan.score.tensors.values()]
    leaves = [x.requires_grad_() for x in (q, k, v)] + learned
    out, lse = seqpar.attention_with_lse(q, k, v, plan)
    forward = group.traffic.total
    results = out, lse
    gradients = torch.autograd.grad(results, leaves, (dout, dlse[:, rows]))
    sent = Volume(forward, group.traffic.total - forward)
    shape = Shape.of(q, k, v, learns=tuple(plan.score.tensors), with_lse=True)
    resolved = resolve(plan, q, v, with_lse=True)
    assert sent == dry_run.sent(resolved, shape, group.rank)
    return out.detach(), lse.detach(), gradients


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("what", CASES)
def test_out_and_lse_and_gradients_of_both(what, strategy):
    case = CASES[what]
    generator = torch.Generator().manual_seed(1)
    dlse = torch.randn(case.batch, case.length, case.hq, dtype=torch.float64, generator=generator)
    out, lse, gradients = dense(case, dlse)
    for size in (1, 2, 4):
        results = simulate(size, on_each_rank, case, strategy, dlse)
        for rank, (out_r, lse_r, got) in enumerate(results):
            rows, cols = (x.positions(rank) for x in (case.layout(size), case.keys(size)))
            torch.testing.assert_close(out_r, out[:, rows], **EXACT)
            torch.testing.assert_close(lse_r, lse[:, rows], **EXACT)
            for x, y, at in zip(got, gradients, (rows, cols, cols), strict=False):
                torch.testing.assert_close(x, y[:, at], **EXACT)
        for n, y in enumerate(gradients[3:], start=3):
            torch.testing.assert_close(sum(r[2][n] for r in results), y, **EXACT)


def test_lse_alone_may_be_used():
    case = CASES["zigzag"]
    dlse = torch.ones(1, 33, 4, dtype=torch.float64)

    def fn(group, strategy):
        rows = case.layout(group.size).positions(group.rank)
        q, k, v, _ = (x[:, rows].requires_grad_() for x in case.tensors())
        _, lse = seqpar.attention_with_lse(q, k, v, case.plan(group, strategy))
        return torch.autograd.grad(lse.sum(), (q, k))

    q, k, *_ = (x.requires_grad_() for x in case.tensors())
    seen = oracle.visible(33, True, None)
    s = oracle.scores(q, k, case.terms()).masked_fill(~seen, -torch.inf)
    expected = torch.autograd.grad((torch.logsumexp(s, -1).transpose(1, 2) * dlse).sum(), (q, k))
    for strategy in STRATEGIES:
        for rank, got in enumerate(simulate(3, fn, strategy)):
            rows = case.layout(3).positions(rank)
            for x, y in zip(got, expected, strict=True):
                torch.testing.assert_close(x, y[:, rows], **EXACT)


def test_a_shared_prefix_and_each_rows_own_keys():
    """A prefix attended by cross attention and the rest causally, merged, is causal attention."""
    prefix, rest, heads = 13, 20, 2
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(
        4, 1, prefix + rest, heads, 4, dtype=torch.float64, generator=generator
    ).unbind(0)

    def fn(group):
        before, after = seqpar.contiguous(prefix, group.size), seqpar.zigzag(rest, group.size)
        old, new = before.positions(group.rank), prefix + after.positions(group.rank)
        q = whole[0][:, new].requires_grad_()
        k_old, v_old, k_new, v_new = leaves = [
            x[:, at].requires_grad_() for at in (old, new) for x in whole[1:3]
        ]
        parts = [
            seqpar.attention_with_lse(
                q, k_old, v_old, Plan(group, after, strategy="mesh", grid=group.grid(ring=1),
                                      kv_layout=before)
            ),
            seqpar.attention_with_lse(q, k_new, v_new, Plan(group, after, Mask(causal=True))),
        ]  # fmt: skip
        out, lse = seqpar.merge(parts)
        grads = torch.autograd.grad(out, [q, *leaves], whole[3][:, new])
        return out.detach(), lse.detach(), grads, old, new

    q, k, v = (x.clone().requires_grad_() for x in whole[:3])
    seen = oracle.visible(prefix + rest, True, None)[prefix:]
    out = oracle.attention(q[:, prefix:], k, v, seen, oracle.Terms(0.5))
    expected = torch.autograd.grad(out, (q, k, v), whole[3][:, prefix:])
    for got, _, (dq, dk_old, dv_old, dk_new, dv_new), old, new in simulate(3, fn):
        torch.testing.assert_close(got, out[:, new - prefix], **EXACT)
        torch.testing.assert_close(dq, expected[0][:, new], **EXACT)
        for x, y, at in ((dk_old, 1, old), (dv_old, 2, old), (dk_new, 1, new), (dv_new, 2, new)):
            torch.testing.assert_close(x, expected[y][:, at], **EXACT)


def test_merge_where_parts_have_seen_nothing():
    out = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    lse = torch.tensor([0.5, -torch.inf, -torch.inf], dtype=torch.float64)
    other = torch.tensor([[3.0, 4.0], [5.0, 6.0], [0.0, 0.0]], dtype=torch.float64)
    other_lse = torch.tensor([0.5, -900.0, -torch.inf], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (out, lse, other, other_lse)]
    merged, total = seqpar.merge([(out, lse), (other, other_lse)])
    torch.testing.assert_close(
        merged, torch.tensor([[2.0, 3.0], [5.0, 6.0], [0.0, 0.0]], dtype=torch.float64)
    )
    assert total[2] == -torch.inf
    torch.testing.assert_close(total[1], torch.tensor(-900.0, dtype=torch.float64))
    grads = torch.autograd.grad(merged.sum() + total[:2].sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    again, _ = seqpar.merge([(merged, total)])
    torch.testing.assert_close(again, merged)


def test_merge_refuses_what_does_not_fit():
    out, lse = torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1)
    for wrong in ([], [(out, lse[:1])], [(out, lse), (out[:1], lse[:1])]):
        with pytest.raises(
            ValueError, match=r"merge takes \(out \[\.\. vd\], lse \[\.\.\]\) pairs"
        ):
            seqpar.merge(wrong)


def test_what_cannot_differentiate_lse_is_refused():
    def fn(group):
        x = torch.ones(1, 2, 1, 4)
        plan = Plan(group, seqpar.zigzag(4, 2), implementation="aten")
        seqpar.attention_with_lse(x, x, x, plan)

    with pytest.raises(NotImplementedError, match="'aten' derives delta from out"):
        simulate(2, fn)
