"""Backward in two parts, as pipelines without bubbles take it: of inputs first, of weights later."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import simulate

LENGTH = 11
KINDS = {
    "ring": seqpar.RingAttention,
    "ulysses": seqpar.UlyssesAttention,
    "hybrid": lambda group: seqpar.HybridAttention(group.grid(ulysses=2)),
    "rows": seqpar.MaterialisedAttention,
}
CHECKPOINTING = {
    "none": lambda block, x: block(x),
    "full": partial(checkpoint, use_reentrant=False),
    "keep-attention": partial(checkpoint, use_reentrant=False, context_fn=seqpar.keep_attention),
}


class Layer(nn.Module):
    """Attention between two products, all of whose terms learn."""

    def __init__(self, group, kind, layout):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36, bias=False), nn.Linear(12, 12)
        self.sinks, self.slopes = nn.Parameter(torch.empty(3)), nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(3, LENGTH, LENGTH))
        self.attention, self.layout = KINDS[kind](group), layout
        generator = torch.Generator().manual_seed(0)
        for p in self.double().parameters():
            nn.init.normal_(p, std=0.3, generator=generator)

    def forward(self, x):
        terms = {"sinks": self.sinks, "alibi_slopes": self.slopes, "bias": self.bias}
        self.attention.score = seqpar.Score(**terms)
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).unbind(2)
        return x + self.out(self.attention(q, k, v, self.layout).flatten(2))


def split(group, kind, checkpointing):
    """Two micro-batches: both of whose inputs come first, then the weights of the one that began last."""
    layout = seqpar.zigzag(LENGTH, group.size)
    layer, again = Layer(group, kind, layout), CHECKPOINTING[checkpointing]
    draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wholes = draw(2, 2, 1, LENGTH, 12)
    xs, douts = ([seqpar.shard_sequence(x, layout, group.rank).clone() for x in y] for y in wholes)
    weights = list(layer.parameters())
    wanted = [
        torch.autograd.grad(layer(x.requires_grad_()), [x, *weights], dout)
        for x, dout in zip(xs, douts, strict=True)
    ]
    outs = [[again(layer, x)] for x in xs]
    later = [
        stage_backward_input(out, [dout], [x], layer.parameters())[1]
        for out, dout, x in zip(outs, douts, xs, strict=True)
    ]
    for n in (1, 0):
        stage_backward_weight(layer.parameters(), later[n])
        found = [xs[n].grad, *(p.grad for p in weights)]
        torch.testing.assert_close(found, list(wanted[n]), rtol=1e-11, atol=1e-11)
        layer.zero_grad()
    return True


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", KINDS)
def test_terms_that_learn_have_the_gradients_of_one_backward(kind, checkpointing):
    assert all(simulate(4, split, kind, checkpointing))
