"""A NaN in one packed document stays in it, for every strategy, implementation and number of ranks.

A failure for several ranks alone says that something that travels, is gathered or is summed takes a row to
others; for one rank, `tests/block/test_poison.py` should fail too.
"""

import pytest
import torch

from seqpar import Mask, Plan, attention, shard_sequence, simulate, unshard_sequence, zigzag
from seqpar.strategies import STRATEGIES

LENGTH, HEADS, KV_HEADS, WIDTH = 33, 4, 2, 8
MASK = Mask(causal=True, documents=(0, 7, 20, 33))
POISONED, INSIDE = 15, slice(7, 20)
NAMES = ("q", "k", "v", "dout")
WAYS = [
    (name, implementation)
    for name, strategy in STRATEGIES.items()
    for implementation in ("reference", "aten")
    if implementation == "reference" or not strategy.stores_scores
]


def inputs():
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(2, LENGTH, h, WIDTH, generator=generator) for h in heads]


def on_a_rank(group, strategy, implementation, tensors):
    """Out, dq, dk, dv of the whole sequence."""
    layout = zigzag(LENGTH, group.size)
    grid = group.grid(ulysses=1) if STRATEGIES[strategy].needs_grid else None
    plan = Plan(group, layout, MASK, strategy=strategy, implementation=implementation, grid=grid)
    *mine, dout = (shard_sequence(x, layout, group.rank) for x in tensors)
    mine = [x.clone().requires_grad_() for x in mine]
    out = attention(*mine, plan)
    parts = (out.detach(), *torch.autograd.grad(out, mine, dout))
    return [unshard_sequence(x, layout, group) for x in parts]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("strategy", "implementation"), WAYS)
def test_other_documents_have_the_bits_they_have_without_it(strategy, implementation, size):
    clean = inputs()
    want = simulate(size, on_a_rank, strategy, implementation, clean)[0]
    for n, name in enumerate(NAMES):
        bad = [x.clone() for x in clean]
        bad[n][0, POISONED] = float("nan")
        got = simulate(size, on_a_rank, strategy, implementation, bad)[0]
        for result, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            outside = torch.ones(2, LENGTH, dtype=torch.bool)
            outside[0, INSIDE] = False
            assert torch.equal(x[outside], y[outside]), f"NaN in {name} reaches {result}"
            own = x[0, POISONED if result in ("out", "dq") else slice(7, 8)]
            is_reached = (name, result) not in (("dout", "out"), ("v", "dv"))
            assert own.isnan().all() == is_reached, f"NaN in {name}, {result}"
