"""The dry run against what real steps send and compute, and against itself from rank to rank.

What it says of bytes held is compared with the profiler in `tests/scripts/test_activation_memory.py`.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqpar
from seqpar import Mask, Plan, Score, simulate
from seqpar.calls import Shape, Volume, dry_run, resolve
from seqpar.calls.dry_run import Compute, Exchange, Wait
from seqpar.comm import silent
from seqpar.layout import contiguous, visible_count, zigzag
from seqpar.strategies import STRATEGIES
from seqpar.testing import Case
from seqpar.testing.drawn import ALL_TERMS, WORLD_SIZES, cases, examples


def step(group, case, make, shape):
    """What a real step sends on this rank."""
    plan = make(group)
    rows, cols = (x.positions(group.rank) for x in (plan.layout, plan.keys))
    q, k, v, dout = (
        x[:, at] for x, at in zip(case.tensors(), (rows, cols, cols, rows), strict=True)
    )
    learned = {
        name: x.detach().requires_grad_(name in shape.learns)
        for name, x in plan.score.tensors.items()
    }
    plan = replace(plan, score=plan.score.with_tensors(learned))
    leaves = [x.requires_grad_() for x in (q, k, v)] + [learned[name] for name in shape.learns]
    if shape.with_lse:
        ends = seqpar.attention_with_lse(*leaves[:3], plan)
        gradients = dout, torch.ones_like(ends[1])
    else:
        ends, gradients = (seqpar.attention(*leaves[:3], plan),), (dout,)
    forward = group.traffic.total
    torch.autograd.grad(ends, leaves, gradients)
    return Volume(forward, group.traffic.total - forward)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    case=cases(terms=ALL_TERMS, lengths=st.integers(0, 40)), size=WORLD_SIZES,
    implementation=st.sampled_from([None, "reference"]), chunks=st.integers(1, 3),
    with_lse=st.booleans(), learns=st.tuples(st.booleans(), st.booleans()), invariant=st.booleans(),
)  # fmt: skip
@settings(max_examples=examples(0.5))
def test_says_what_is_sent(
    strategy, case, size, implementation, chunks, with_lse, learns, invariant
):
    def make(group):
        plan = case.plan(group, strategy, implementation)
        if STRATEGIES[strategy].exchanges_heads:
            plan = replace(plan, head_chunks=chunks)
        q, _, v, _ = case.tensors()
        if invariant:
            try:
                return resolve(replace(plan, invariant=True), q, v, with_lse=with_lse)
            except (ValueError, NotImplementedError):
                pass
        return resolve(replace(plan, invariant=None), q, v, with_lse=with_lse)

    plan = make(silent(0, size))
    q, k, v, _ = case.tensors()
    there = plan.score.tensors
    wanted = (name for name, learn in zip(("alibi_slopes", "sinks"), learns, strict=True) if learn)
    learns = tuple(name for name in wanted if name in there)
    shape = Shape.of(q, k, v, learns=learns, with_lse=with_lse)
    for rank, sent in enumerate(simulate(size, step, case, make, shape)):
        assert dry_run.sent(plan, shape, rank) == sent, rank


@pytest.mark.parametrize("strategy", [n for n, s in STRATEGIES.items() if not s.stores_scores])
@pytest.mark.parametrize("case", [
    Case(37, 4, 2, kind="zigzag", degree=1),
    Case(40, 4, 2, kind="striped", window=5, degree=1),
    Case(40, 4, 4, documents=(0, 7, 7, 19, 40), degree=1, alibi=True),
], ids=["zigzag", "window", "documents"])  # fmt: skip
@pytest.mark.parametrize("implementation", ["reference", "aten"])
def test_steps_fit_together(strategy, case, implementation):
    """What one rank sends another receives; all visible scores are computed once; all is waited for."""
    if implementation == "aten" and case.alibi:
        pytest.skip("aten has no ALiBi")
    size = 4
    plan = case.plan(silent(0, size), strategy, implementation)
    shape = Shape(1, case.hq, case.hkv, case.d, case.vd, torch.float32)
    found = [dry_run.steps(plan, shape, rank) for rank in range(size)]
    scores = sum(
        visible_count(case.mask, a, b)
        for rows in plan.layout.spans for a in rows for cols in plan.layout.spans for b in cols
    )  # fmt: skip
    for direction in ("forward", "backward"):
        sends, receives, computed = Counter(), Counter(), 0
        for rank, steps in enumerate(found):
            begun, ended = set(), set()
            for one in getattr(steps, direction):
                if isinstance(one, Exchange):
                    begun.add(one.number)
                    sends.update((rank, peer, size) for peer, size in one.sends)
                    receives.update((peer, rank, size) for peer, size in one.receives)
                elif isinstance(one, Wait):
                    assert one.number in begun
                    ended.add(one.number)
                elif isinstance(one, Compute):
                    assert one.direction == direction
                    computed += one.scores
            assert begun == ended
        assert sends == receives
        assert computed == case.hq * scores


def test_the_steps_of_a_causal_ring():
    """Three ranks of four rows: rank 1 sends its keys on while it computes, and receives those of rank 0."""
    plan = Plan(silent(1, 3), contiguous(12, 3), Mask(causal=True), implementation="reference")
    steps = dry_run.steps(plan, Shape(1, 1, 1, 8, 8, torch.float32), 1)
    block = 4 * 16 * 4  # k and v of four rows
    assert steps.forward == (
        Exchange(0, "ring_pass", ((2, block),), ((0, block),)),
        Compute("forward", 4, 4, 10),
        Wait(0),
        Exchange(1, "ring_pass", ((2, block),), ()),
        Compute("forward", 4, 4, 16),
        Wait(1),
        Exchange(2, "ring_pass", (), ()),
        Wait(2),
    )


def test_shards_that_one_rank_alone_does_not_have_cost_nothing_to_ask():
    """A rank of a thousand is told of without a world, and another machine's kernels without them."""
    plan = Plan(silent(0, 1000), zigzag(64_000, 1000), Mask(causal=True), implementation="triton")
    shape = Shape(1, 32, 8, 128, 128, torch.bfloat16)
    held = dry_run.held(plan, shape, 7)
    assert dry_run.sent(plan, shape, 7).forward.bytes == 999 * 64 * 8 * 256 * 2
    assert 0 < held.kept < held.forward < held.backward == held.peak


def test_what_learns_is_held_and_sent():
    """Sums of learned tensors are by row: where queries travel, they travel with them."""
    slopes = torch.ones(2, requires_grad=True)
    plan = Plan(
        silent(0, 2), contiguous(8, 2), score=Score(alibi_slopes=slopes), implementation="reference"
    )
    sizes = 1, 2, 2, 16, 16, torch.bfloat16
    still, learning = Shape(*sizes), Shape(*sizes, learns=("alibi_slopes",))
    more = (
        dry_run.sent(plan, learning, 0).backward.bytes - dry_run.sent(plan, still, 0).backward.bytes
    )
    assert more == 4 * 2 * 4  # a float32 for each of four rows and two heads
