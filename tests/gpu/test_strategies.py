"""Every strategy on the GPU, ranks as threads of one process, equals one-device attention.

Twins: `tests/strategies/test_equivalence.py`.
"""

import pytest
import torch

from seqpar import simulate
from seqpar.strategies import STRATEGIES
from seqpar.testing import Case, errors_on_rank

CASES = [
    Case(300, 4, 2, 64, 64, dtype=torch.bfloat16, kind="zigzag"),
    Case(257, 4, 4, 128, 128, 2, dtype=torch.float16, kind="contiguous", causal=False),
    Case(300, 8, 2, 32, 32, dtype=torch.bfloat16, kind="striped", window=70),
    Case(400, 4, 4, 64, 64, dtype=torch.bfloat16, kind="zigzag", documents=(0, 90, 91, 250, 400)),
    Case(130, 4, 2, 40, 24, dtype=torch.bfloat16, kind="unsorted"),
    Case(200, 4, 2, 64, 64, dtype=torch.float32, kind="zigzag"),
    Case(90, 4, 2, 16, 16, dtype=torch.float64, kind="striped"),
    Case(160, 4, 2, 64, 64, dtype=torch.bfloat16, kind="zigzag", alibi=True, dropout=0.3),
    Case(160, 4, 2, 64, 64, dtype=torch.bfloat16, kind="striped", sinks=True, softcap=5.0),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_device(case, size, strategy):
    results = simulate(size, errors_on_rank, case, strategy, None, case.budget(), "cuda")
    for rank, errors in enumerate(results):
        assert not errors.failures, f"rank {rank}: {errors.failures}"


@pytest.mark.parametrize("implementation", ["aten", "cudnn", "triton", "flex"])
@pytest.mark.parametrize("strategy", ["ulysses", "ring", "allgather"])
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_every_implementation_equals_one_device(case, strategy, implementation):
    budget = case.budget()
    results = simulate(3, errors_on_rank, case, strategy, implementation, budget, "cuda")
    for rank, errors in enumerate(results):
        assert not errors.failures, f"rank {rank}: {errors.failures}"


# Others add to dq as it comes.
EXACT = {
    "triton": ("out", "dq", "dk", "dv"),
    "cudnn": ("out", "dk", "dv"),
    "aten": ("out", "dk", "dv"),
}


@pytest.mark.parametrize("implementation", EXACT)
@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
def test_the_same_call_gives_the_same_bits(strategy, implementation):
    case = Case(1000, 4, 4, 64, 64, dtype=torch.bfloat16, kind="zigzag")

    def results(group):
        from seqpar.testing import run_step

        at = case.layout(group.size).positions(group.rank)
        tensors = (x[:, at].to("cuda") for x in case.tensors())
        plan = case.plan(group, strategy, implementation, "cuda")
        return [x.cpu() for x in run_step(*tensors, plan).results]

    first = simulate(2, results)
    for _ in range(3):
        for one, other in zip(first, simulate(2, results), strict=True):
            for name, x, y in zip(("out", "dq", "dk", "dv"), one, other, strict=True):
                assert torch.equal(x, y) or name not in EXACT[implementation], name
