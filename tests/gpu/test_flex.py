"""FlexAttention, compiled: functions of one score and biases on the GPU, beside the reference on it.

Twins: `tests/block/test_flex.py`, where it is not compiled.
"""

import pytest
import torch

import seqpar
from seqpar import Mask, Plan, Score, simulate

N, HEADS = 300, 4
DOCUMENTS = torch.arange(N) // 110


def numbers(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).cuda()


def trained(group, implementation, strategy, dtype):
    layout = seqpar.zigzag(N, group.size)
    mine = layout.positions(group.rank).cuda()
    q, k, v, dout = (numbers(2, N, h, 64, seed=h).to(dtype)[:, mine] for h in (4, 2, 2, 4))
    table, factors = (numbers(HEADS, n, seed=n).requires_grad_() for n in (9, 1))
    of = DOCUMENTS.cuda()
    mask = Mask(window=(90, 20)) & Mask(mask_mod=lambda b, h, i, j: of[i] == of[j])
    score = Score(
        softcap=20.0,
        relative_bias=table,
        score_mod=lambda s, b, h, i, j: s + factors[h, 0] * (i - j) / N,
    )
    plan = Plan(group, layout, mask, score, strategy, implementation)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = seqpar.attention(*leaves, plan)
    grads = torch.autograd.grad(out, [*leaves, table, factors], dout)
    return [x.float() for x in (out.detach(), *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize("size", [1, 2])
def test_equals_the_reference(size, strategy, dtype):
    """Within twice the distance of the reference from float32."""
    runs = [
        simulate(size, trained, *how)
        for how in (
            ("flex", strategy, dtype),
            ("reference", strategy, dtype),
            ("reference", strategy, torch.float32),
        )
    ]
    for got, same, exact in zip(*runs, strict=True):
        for one, other, best in zip(got, same, exact, strict=True):
            scale = best.abs().max()
            error, allowed = (one - best).abs().max(), (other - best).abs().max()
            assert error <= 2 * allowed + 2e-3 * scale, (error, allowed, scale)
