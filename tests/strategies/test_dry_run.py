"""The dry run against the formulas of what strategies send, for any plan."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar.comm import silent
from seqpar.strategies import HEAD_STRATEGIES, STRATEGY_NAMES, VOLUMES, Shape, resolve
from seqpar.strategies.dry_run import sent
from seqpar.testing.drawn import SCORE_TERMS, WORLD_SIZES, cases


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
@given(
    case=cases(terms=SCORE_TERMS), size=WORLD_SIZES, rank=st.integers(0, 7),
    implementation=st.sampled_from([None, "reference"]), chunks=st.integers(1, 3),
    with_lse=st.booleans(), learns=st.tuples(st.booleans(), st.booleans()), invariant=st.booleans(),
)  # fmt: skip
@settings(max_examples=90)
def test_sends_what_the_formula_says(
    strategy, case, size, rank, implementation, chunks, with_lse, learns, invariant
):
    plan = case.plan(silent(rank % size, size), strategy, implementation)
    q, _, v, _ = case.tensors()
    if strategy in HEAD_STRATEGIES:
        plan = replace(plan, head_chunks=chunks)
    if invariant:
        try:
            plan = resolve(replace(plan, invariant=True), q, v, with_lse=with_lse)
        except (ValueError, NotImplementedError):
            invariant = False
    if not invariant:
        plan = resolve(replace(plan, invariant=None), q, v, with_lse=with_lse)
    slopes, sinks = (
        x is not None and learn
        for x, learn in zip((plan.score.alibi_slopes, plan.score.sinks), learns, strict=True)
    )
    shape = Shape.of(q, v[..., : case.d], v, with_lse=with_lse, slopes_learn=slopes, sinks_learn=sinks)
    assert sent(plan, shape, rank % size) == VOLUMES[strategy](plan, rank % size, shape)
