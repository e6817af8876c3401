"""Heads that are attended apart drop the weights that they drop together."""

from dataclasses import replace

import pytest
import torch

import seqpar
from seqpar.strategies import STRATEGIES

LENGTH, HEADS, KV_HEADS, CUT = 23, 6, 3, 4


def attend_apart(group, strategy, q, k, v, dout):
    layout = seqpar.contiguous(LENGTH, group.size)
    grid = group.grid(ulysses=2) if strategy in ("mesh", "hybrid") else None
    slopes = torch.linspace(0.1, 0.6, HEADS, dtype=q.dtype)
    whole = seqpar.Plan(
        group, layout, seqpar.Mask(causal=True), seqpar.Score(alibi_slopes=slopes), strategy,
        "reference", seqpar.Dropout(0.4, 11), grid=grid,
    )  # fmt: skip
    mine = [seqpar.shard_sequence(x, layout, group.rank, dim=1) for x in (q, k, v, dout)]
    together = [x.clone().requires_grad_() for x in mine[:3]]
    apart = [x.clone().requires_grad_() for x in mine[:3]]
    want = seqpar.attention(*together, whole)
    outs = []
    for start, stop in ((0, CUT), (CUT, HEADS)):
        of_kv = slice(start // 2, stop // 2)
        part = replace(whole, score=whole.score.of_heads(start, stop - start), first_head=start)
        q_l, k_l, v_l = apart
        outs.append(
            seqpar.attention(q_l[:, :, start:stop], k_l[:, :, of_kv], v_l[:, :, of_kv], part)
        )
    got = torch.cat(outs, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    wants = torch.autograd.grad(want, together, mine[3])
    grads = torch.autograd.grad(got, apart, mine[3])
    for ours, theirs in zip(grads, wants, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_heads_drop_the_same_weights_wherever_they_are_attended(strategy):
    torch.manual_seed(3)
    sizes = {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS, "dout": HEADS}
    whole = [torch.randn(2, LENGTH, h, 5, dtype=torch.float64) for h in sizes.values()]
    for size in (1, 2):
        if strategy in ("mesh", "hybrid") and size == 1:
            continue
        seqpar.simulate(size, attend_apart, strategy, *whole)


@pytest.mark.parametrize(
    ("first", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_head_that_is_none_is_refused(first, error):
    group = seqpar.Group.alone()
    x = torch.randn(1, 3, 1, 2)
    with pytest.raises(error, match="first_head"):
        seqpar.attention(x, x, x, seqpar.Plan(group, seqpar.contiguous(3, 1), first_head=first))


def test_compiled_code_knows_its_first_head():
    torch.manual_seed(3)
    group, layout = seqpar.Group.alone(), seqpar.contiguous(LENGTH, 1)
    q, k, v = (torch.randn(1, LENGTH, h, 5) for h in (HEADS, KV_HEADS, KV_HEADS))
    zeroth = seqpar.Plan(group, layout, dropout=seqpar.Dropout(0.4, 11))
    third = replace(zeroth, first_head=3)

    def attend(q, k, v):
        return seqpar.attention(q, k, v, third)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), attend(q, k, v))
    assert not torch.equal(seqpar.attention(q, k, v, zeroth), attend(q, k, v))
