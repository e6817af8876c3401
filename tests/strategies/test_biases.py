"""Biases of scores: T5's buckets, ALiBi signed and by batch entry, and what they are refused for.

That every strategy gives values and gradients of one device is drawn in `test_equivalence`.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import Mask, Plan, Score, biases, contiguous, simulate, zigzag
from seqpar.strategies import STRATEGIES
from seqpar.testing.refusals import check_told, told

N, HEADS = 14, 4
CAUSAL = Mask(True)
ONE = torch.ones(5)
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def attended(group, score, strategy="ring", *, mask=CAUSAL, kv_length=N, **options):
    """Out of all rows, and the gradients of the score's tensors summed over ranks."""
    layout, keys = zigzag(N, group.size), zigzag(kv_length, group.size)
    q, k, v = rand(2, N, HEADS, 8), *rand(2, 2, kv_length, 2, 8, seed=1)
    rows, cols = layout.positions(group.rank), keys.positions(group.rank)
    grid = group.grid(ulysses=1) if STRATEGIES[strategy].needs_grid else None
    plan = Plan(group, layout, mask, score, strategy, kv_layout=keys, grid=grid, **options)
    out = seqpar.attention(q[:, rows], k[:, cols], v[:, cols], plan)
    whole = seqpar.unshard_sequence(out, layout, group, dim=1)
    held = (*score.tensors.values(), *score.captured)
    learned = [*{id(x): x for x in held if x.requires_grad}.values()]
    if not learned:
        return whole, []
    grads = list(torch.autograd.grad(out, learned, rand(2, N, HEADS, 8, seed=3)[:, rows]))
    for grad in grads:
        group.all_reduce_(grad, "sum")
    return whole.detach(), grads


def run(size, score, strategy="ring", **options):
    return simulate(size, partial(attended, score=score, strategy=strategy, **options))


def check_same(got, expected, **tolerances):
    for (out, grads), (out_1, grads_1) in zip(got, expected, strict=True):
        torch.testing.assert_close(out, out_1, **tolerances or EXACT)
        for one, other in zip(grads, grads_1, strict=True):
            torch.testing.assert_close(one, other, **tolerances or EXACT)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_alibi_by_numbers_is_alibi(strategy):
    slopes = rand(HEADS)
    by_numbers = Score(relative_bias=biases.alibi(slopes, N))
    one = run(3, by_numbers, strategy, mask=Mask(window=5))
    other = run(3, Score(alibi_slopes=slopes), strategy, mask=Mask(window=5))
    check_same(one, other)


def test_slopes_may_differ_by_batch_entry_and_by_direction():
    slopes, (i, j) = rand(2, HEADS), (torch.arange(N)[:, None], torch.arange(N))
    for made, distances in ((biases.alibi, -(i - j).abs()), (biases.signed_alibi, j - i)):
        one = run(2, Score(relative_bias=made(slopes, N)), mask=Mask())
        dense = Score(bias=slopes[:, :, None, None] * distances)
        check_same(one, run(2, dense, mask=Mask()))


def test_what_a_bias_is_made_of_learns():
    """The buckets of T5, of which distances share some; over keys of another length too."""
    for length, align in ((N, "top-left"), (N + 9, "bottom-right")):
        found = []
        for size in (1, 3):
            weight = rand(8, HEADS, seed=5).requires_grad_()
            score = Score(relative_bias=biases.t5(weight, max_distance=6))
            mask = Mask(True, align=align)
            (_, (share,)), *_ = run(size, score, mask=mask, kv_length=length)
            found += torch.autograd.grad(score.relative_bias, weight, share)
        assert found[0].abs().max() > 0
        torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "materialised_columns"])
def test_a_tensor_in_two_places_has_the_sum_of_both_gradients(strategy):
    bias = rand(1, 1, N, N).requires_grad_()  # of which the part of some heads is the tensor itself
    other = bias.detach().clone().requires_grad_()

    def scored(held):
        return Score(bias=bias, score_mod=lambda s, b, h, i, j: s + 2 * held[0, 0, i, j])

    (out, grads), *_ = run(2, scored(bias), strategy)
    (out_1, (once, twice)), *_ = run(2, scored(other), strategy)
    torch.testing.assert_close(out, out_1, **EXACT)
    torch.testing.assert_close(twice, 2 * once, **EXACT)
    torch.testing.assert_close(*grads, 3 * once, **EXACT)


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "mesh", "materialised_rows"])
def test_recomputed_biases_have_one_gradient(strategy):
    bias, relative = rand(N).requires_grad_(), rand(HEADS, 5, seed=1).requires_grad_()

    def step(group, *, again):
        layout = contiguous(N, group.size)
        q = rand(2, N, HEADS, 8)[:, layout.positions(group.rank)].requires_grad_()
        grid = group.grid(ulysses=1) if STRATEGIES[strategy].needs_grid else None
        score = Score(bias=bias, relative_bias=relative)
        plan = Plan(group, layout, Mask(True), score, strategy, grid=grid)

        def attend(q):
            return seqpar.attention(q, q, q, plan)

        out = checkpoint(attend, q, use_reentrant=False) if again else attend(q)
        return torch.autograd.grad(out.square().sum(), [q, bias, relative])

    for one, other in zip(
        simulate(2, partial(step, again=False)), simulate(2, partial(step, again=True)), strict=True
    ):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "materialised_rows"])
def test_attention_is_kept_beside_a_bias_that_learns(strategy):
    bias, relative = rand(N, N).requires_grad_(), rand(HEADS, 5, seed=1).requires_grad_()

    def step(group, *, kept):
        layout = contiguous(N, group.size)
        q = rand(2, N, HEADS, 8)[:, layout.positions(group.rank)].requires_grad_()
        plan = Plan(group, layout, Mask(True), Score(bias=bias, relative_bias=relative), strategy)
        context = {"context_fn": seqpar.keep_attention} if kept else {}
        out = checkpoint(
            lambda y: seqpar.attention(y, y, y, plan), q, use_reentrant=False, **context
        )
        return torch.autograd.grad(out.square().sum(), [q, bias, relative])

    for size in (1, 2):
        kept, plain = (simulate(size, partial(step, kept=kept)) for kept in (True, False))
        for one, other in zip(kept, plain, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


TYPES = [(torch.float32, torch.float64), (torch.float64, torch.float32)]


@pytest.mark.parametrize(("wide", "of_bias"), TYPES)
@pytest.mark.parametrize("strategy", ["ring", "ulysses", "materialised_rows"])
def test_biases_of_another_type_learn(strategy, wide, of_bias):
    found = []
    for dtype in (of_bias, torch.float64):
        bias, relative = (
            x.to(of_bias).to(dtype).requires_grad_() for x in (rand(N, N), rand(HEADS, 5))
        )

        def step(group, bias=bias, relative=relative, dtype=dtype):
            layout = contiguous(N, group.size)
            kind = wide if dtype == of_bias else torch.float64
            q = rand(2, N, HEADS, 8).to(wide).to(kind)[:, layout.positions(group.rank)]
            plan = Plan(
                group, layout, Mask(True), Score(bias=bias, relative_bias=relative), strategy
            )
            out = seqpar.attention(q, q, q, plan)
            return torch.autograd.grad(out.sum(), [bias, relative])

        found.append([sum(x).double() for x in zip(*simulate(2, step), strict=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_was_written_since_is_refused_in_backward():
    for strategy in ("ring", "ulysses", "materialised_rows"):
        bias = rand(N, N).requires_grad_()

        def step(group, strategy=strategy, bias=bias):
            layout = contiguous(N, group.size)
            q = rand(1, N, HEADS, 8).requires_grad_()
            out = seqpar.attention(q, q, q, Plan(group, layout, Mask(), Score(bias=bias), strategy))
            with torch.no_grad():
                bias.add_(1)
            out.sum().backward()

        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            simulate(1, step)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"score": Score(bias=rand(N, N + 3)), "mask": Mask(True, align="bottom-right"),
          "kv_length": N + 3}, "a bias counts rows and keys from 0, and this mask has rows stand"),
        ({"score": Score(relative_bias=rand(5)), "kv_length": N + 3, "mask": Mask()},
         "ALiBi or a relative bias stand"),
        ({"score": Score(relative_bias=rand(5).requires_grad_()), "strategy": "ulysses",
          "invariant": True}, "gradients of biases and of what a score_mod holds are sums over scores"),
        ({"score": Score(bias=rand(N)), "implementation": "aten"}, "'aten' has no bias; 'reference' does"),
        ({"score": Score(relative_bias=rand(1)), "implementation": "triton"}, "relative bias|float64"),
    ],
)  # fmt: skip
def test_refused(options, said):
    check_told([told(lambda: run(2, **options))], said)


def test_a_bias_says_nothing_of_where_rows_stand():
    """Cross attention by a bias alone, whose rows and keys are counted by themselves."""
    bias = rand(HEADS, N, 5)
    (out, _), *_ = run(2, Score(bias=bias), mask=Mask(), kv_length=5)
    q, (k, v) = rand(2, N, HEADS, 8), rand(2, 2, 5, 2, 8, seed=1).repeat_interleave(2, 3)
    s = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5 + bias
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v), **EXACT)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Score(bias=3.0), TypeError, "bias must be a floating point tensor"),
        (lambda: Score(bias=torch.ones(3, dtype=torch.long)), TypeError, "bias must be a floating"),
        (lambda: Score(bias=torch.ones(1, 1, 1, 2, 2)), ValueError, "bias must be .b hq i j. or what"),
        (lambda: Score(relative_bias=torch.ones(4, 6)), ValueError, "even number of distances"),
        (lambda: Score(relative_bias=torch.ones(2, 4, 2, 5)), ValueError, "relative_bias must be"),
        (lambda: Score(relative_bias=torch.ones(1, 4, 1, 5)), ValueError, "relative_bias must be"),
        (lambda: Score(bias=ONE, relative_bias=ONE), ValueError, "must be two tensors: give a clone"),
        (lambda: biases.t5(torch.ones(3)), ValueError, "weight must be .buckets hq., got .3,"),
        (lambda: biases.t5(3), TypeError, "weight must be a floating point tensor"),
        (lambda: biases.t5(torch.ones(32, 4), max_distance=8), ValueError, "fewer than max_distance=8"),
        (lambda: biases.t5(torch.ones(2, 4)), ValueError, "of 1 buckets 0 are for one distance"),
        (lambda: biases.t5(torch.ones(32, 4), max_distance=9.0), TypeError, "must be an integer"),
        (lambda: biases.alibi(torch.ones(2, 2, 2), 4), ValueError, "slopes must be .hq. or .b hq."),
        (lambda: biases.alibi(torch.ones(2).long(), 4), TypeError, "slopes must be a floating"),
        (lambda: biases.signed_alibi(torch.ones(2), 0), ValueError, "length must be at least 1"),
        (lambda: biases.signed_alibi(torch.ones(2), True), TypeError, "length must be an integer"),
    ],
)  # fmt: skip
def test_what_is_no_bias(make, error, said):
    with pytest.raises(error, match=said):
        make()


def test_plans_tell_biases_apart():
    """By how they broadcast; their numbers are weights."""
    plan = Plan(seqpar.Group.alone(), contiguous(N, 1), Mask(), Score(bias=rand(N)))
    other = replace(plan, score=Score(bias=rand(N, N)))
    told = [seqpar.calls.options.told_of(each)["bias"] for each in (plan, other)]
    assert told == [(torch.float64, (N,)), (torch.float64, (N, N))]
