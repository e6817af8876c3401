"""Every strategy equals dense one-device attention, forward and backward, for every split.

In float64 only the order of summation may differ (1e-11). What each rank sent equals a dry run.
"""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqpar import simulate
from seqpar.strategies import STRATEGIES
from seqpar.testing import Case, errors_on_rank
from seqpar.testing.drawn import ALL_TERMS, SCORE_TERMS, WORLD_SIZES, cases, examples

PLAIN, CAUSAL = ("rectangle", (0, None), (0, None)), ("causal",)


@lru_cache(maxsize=64)
def budget(case):
    """Of a case as one device sees it: the oracle, which is dear, answers once for all strategies."""
    return replace(case, kind="contiguous", multiple_of=1, degree=0).budget()


def check(results):
    for rank, errors in enumerate(results):
        assert not errors.failures, f"rank {rank}: {errors.failures}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=cases(), size=WORLD_SIZES)
@settings(max_examples=examples(1))
@example(Case(length=0), 3)
@example(Case(length=1, window=1), 4)
@example(Case(length=3, hq=6, hkv=2, kind="zigzag"), 5)
@example(Case(length=33, hq=8, hkv=2, kind="striped", window=5), 3)
@example(Case(length=40, hq=2, hkv=1, dtype=torch.bfloat16), 8)
@example(Case(length=1, dtype=torch.float32), 2)
@example(Case(40, 4, 2, kind="zigzag", documents=(0, 7, 7, 19, 40)), 3)
@example(Case(24, causal=False, window=4, kind="striped", documents=(0, 0, 8, 16, 24)), 3)
@example(Case(97, 1, 1, d=3, vd=1, causal=False, window=2, dtype=torch.float32), 1)
@example(Case(40, causal=False, window=3), 8)
@example(Case(41, 4, 2, kind="unsorted", degree=1), 4)
@example(Case(41, 4, 2, kind="unsorted"), 1)
@example(Case(12, 4, 2, kind="stepped", kv_length=9), 1)
@example(Case(60, causal=True, window=4, kind="zigzag"), 6)
@example(Case(30, kind="balanced", documents=(0, 3, 20, 20, 22, 30)), 4)
@example(Case(8, documents=(0, 2, 4, 6, 8)), 4)  # a document for each rank: nothing to send
@example(Case(50, 4, 1, kv_length=7, causal=False, degree=1), 4)
@example(Case(3, 4, 2, kv_length=130, kind="striped", degree=1), 6)
@example(Case(200, 3, 1, window=20, batch=2, kind="zigzag", multiple_of=64, degree=2), 8)
def test_equals_one_device(strategy, case, size):
    check(simulate(size, errors_on_rank, case, strategy, None, budget(case)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=cases(), size=WORLD_SIZES)
@settings(max_examples=examples(0.2))
def test_equals_one_device_with_the_reference_kernel(strategy, case, size):
    check(simulate(size, errors_on_rank, case, strategy, "reference", budget(case)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=cases(terms=ALL_TERMS), size=WORLD_SIZES)
@settings(max_examples=examples(0.5))
@example(Case(33, 4, 2, alibi=True, sinks=True, dropout=0.5, softcap=5.0, kind="zigzag"), 3)
@example(Case(3, 2, 1, alibi=True, sinks=True, dropout=0.5), 5)
@example(Case(40, 6, 3, alibi=True, sinks=True, kind="striped", dtype=torch.bfloat16), 4)
@example(Case(0, alibi=True, sinks=True), 2)
@example(Case(30, 2, 1, alibi=True, dropout=0.5, kind="zigzag", documents=(0, 11, 30)), 4)
@example(Case(70, 4, 2, batch=2, bias="bhij", relative=("bh", 9), kind="striped", alibi=True), 3)
@example(Case(70, 4, 2, batch=2, bias="hj", relative=("", 0), kind="zigzag", softcap=5.0), 4)
@example(Case(30, 2, 1, batch=3, bias="bij", relative=("b", 3), by_row=(PLAIN, CAUSAL, CAUSAL)), 2)
@example(Case(9, 3, 3, bias="i", relative=("h", 30), kv_length=66, window=(40, 5)), 8)
def test_equals_one_device_with_every_score_term(strategy, case, size):
    """Softcap, biases, ALiBi, sinks and dropout, alone and together; all but the first and last learn."""
    check(simulate(size, errors_on_rank, case, strategy, None, budget(case)))


def with_few_heads(case):
    return replace(case, hq=case.hq // case.hkv * min(case.hkv, 2), hkv=min(case.hkv, 2))


SMALL = cases(st.sampled_from([torch.float32, torch.bfloat16]), SCORE_TERMS, st.integers(0, 24))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=SMALL.map(with_few_heads), size=st.integers(1, 4))
@settings(max_examples=examples(0.06))
def test_equals_one_device_with_triton(strategy, case, size):
    """Interpreted where there is no GPU, so problems and worlds are small."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(simulate(size, errors_on_rank, case, strategy, "triton", budget(case), device))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(case=cases(), size=WORLD_SIZES)
@settings(max_examples=examples(0.15))
@example(Case(length=0), 2)
@example(Case(length=2, hq=3, hkv=1), 7)
def test_equals_one_device_over_processes(worlds, strategy, case, size):
    check(worlds.run(size, errors_on_rank, case, strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_long_sequences_cross_every_block_border(strategy, kind):
    """Lengths past the strip and tile sizes of the kernels, windows across them too."""
    for window in (None, 300):
        case = Case(1100, hq=2, hkv=1, d=8, vd=8, kind=kind, window=window)
        check(simulate(3, errors_on_rank, case, strategy, None, budget(case)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_error_does_not_grow_with_the_number_of_ranks(strategy, dtype):
    """Sums are carried in float32: eight ranks are at most half a rounding step worse than one."""
    case = Case(256, hq=8, hkv=8, dtype=dtype, kind="zigzag")

    def worst(size):
        results = simulate(size, errors_on_rank, case, strategy, None, budget(case))
        return {n: max(e.found[n] for e in results) for n in results[0].found}

    one, eight = worst(1), worst(8)
    for name, allowed in zip(one, budget(case).allowed, strict=True):
        assert eight[name] <= max(1.5 * one[name], 0.5 * allowed), name
