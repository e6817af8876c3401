"""Sums of gradients begin with the first share, and no element is left as the memory had it.

What is not initialised holds NaN here, as torch has it where algorithms are to be deterministic.
"""

import pytest
import torch

from seqpar import simulate
from seqpar.strategies import STRATEGIES
from seqpar.testing import Case, errors_on_rank

CASES = [
    Case(40, 4, 2, kind="zigzag"),
    Case(41, 4, 4, kind="zigzag", dtype=torch.bfloat16),
    Case(40, 4, 1, kind="contiguous", window=7),
    Case(33, 2, 2, kind="striped", window=5, dtype=torch.float32),
    Case(40, 4, 2, kind="zigzag", documents=(0, 7, 7, 19, 40)),
    Case(30, 4, 2, kind="contiguous", causal=False, kv_length=7),
    Case(6, 4, 2, kind="contiguous", window=1),
    Case(33, 4, 2, kind="zigzag", alibi=True, sinks=True),
    Case(200, 3, 1, kind="contiguous", multiple_of=64, invariant=True),
    Case(2, 2, 1, kind="contiguous"),
    Case(60, 4, 2, kind="contiguous", window=4, kv_length=9),  # ranks that see nothing
    Case(9, 4, 2, kind="contiguous", causal=False, kv_length=0),
    Case(0, 4, 2, kind="contiguous", causal=False, kv_length=9),
    Case(64, 2, 1, kind="contiguous", causal=False, kv_length=0, multiple_of=64, invariant=True),
    Case(33, 4, 4, kind="zigzag", alibi=True),  # rows travel, and shares of what learns with them
]


WORLDS = [
    (name, case, size, implementation)
    for name, strategy in STRATEGIES.items()
    for case in CASES
    for size in (1, 2, 3, 4)
    for implementation in ((None, "reference") if case.dtype == torch.float64 else (None,))
    if not strategy.stores_scores and not (case.invariant and strategy.order is None)
    # The order of a ring is that of its own keys.
    if not (case.invariant and case.kv_length is not None and name == "ring")
]


@pytest.fixture
def filled():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(("strategy", "case", "size", "implementation"), WORLDS, ids=str)
def test_nothing_is_left_as_memory_had_it(strategy, case, size, implementation):
    results = simulate(size, errors_on_rank, case, strategy, implementation, case.budget())
    for rank, errors in enumerate(results):
        assert not errors.failures, f"rank {rank}: {errors.failures}"
