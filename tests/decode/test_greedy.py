"""64 tokens decoded greedily over sharded caches are those of one device that recomputes everything."""

import math

import torch
from torch import nn

import seqpar
from seqpar import KVCache, Mask, Score, simulate
from seqpar.layout import LAYOUTS

TOKENS = 64
WINDOW, CAP = 20, 4.0


class TinyLM(nn.Module):
    """One layer, 4 query and 2 kv heads, with a window, softcap, ALiBi and sinks, in float64."""

    def __init__(self, vocab=17, e=16, layers=1):
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape):
            x = torch.randn(*shape, dtype=torch.float64, generator=generator)
            return nn.Parameter(x / math.sqrt(shape[-1]))

        self.embedding, self.head = weight(vocab, e), weight(vocab, e)
        self.qkv = nn.ParameterList(weight(8, 6, e) for _ in range(layers))
        self.out = nn.ParameterList(weight(e, 4 * 6) for _ in range(layers))
        self.slopes, self.sinks = weight(4).abs(), weight(4)

    def forward(self, ids, attend):
        """Logits; `attend(layer, q, k, v)` is where rows meet."""
        x = 4 * self.embedding[ids]
        for layer, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = torch.einsum("bse,hde->bshd", x, qkv).split((4, 2, 2), dim=2)
            x = x + 4 * torch.tanh(attend(layer, q, k, v).flatten(2) @ out.T)
        return x @ self.head.T


def dense(model):
    """Attention of one device, written out."""

    def attend(_, q, k, v):
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        place = torch.arange(q.shape[1])
        back = place[:, None] - place
        s = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        s = CAP * torch.tanh(s / CAP) - model.slopes[:, None, None] * back.abs()
        s = s.masked_fill((back < 0) | (back >= WINDOW), -torch.inf)
        sinks = model.sinks[:, None, None].expand(*s.shape[:3], 1)
        p = torch.softmax(torch.cat((s, sinks), -1), -1)[..., :-1]
        return torch.einsum("bhij,bjhd->bihd", p, v)

    return attend


@torch.no_grad()
def one_device(prompt):
    model, ids = TinyLM(), prompt
    for _ in range(TOKENS):
        ids = torch.cat((ids, model(ids, dense(model))[:, -1:].argmax(-1)), dim=1)
    return ids[:, prompt.shape[1] :]


@torch.no_grad()
def sharded(group, prompt, kind):
    model, caches = TinyLM(), {}
    mask, score = Mask(causal=True, window=WINDOW), Score(None, CAP, model.slopes, model.sinks)
    layout = LAYOUTS[kind](prompt.shape[1] - 1, group.size)
    ring = seqpar.RingAttention(group, mask=mask, score=score)

    def prefill(layer, q, k, v):
        caches[layer] = KVCache(group, layout, k, v, mask=mask, score=score)
        return ring(q, k, v, layout)

    model(prompt[:, layout.positions(group.rank)], prefill)
    ids = prompt[:, -1:]
    for _ in range(TOKENS):
        logits = model(ids[:, -1:], lambda layer, *qkv: caches[layer].step(*qkv))
        ids = torch.cat((ids, logits.argmax(-1)), dim=1)
    return ids[:, 1:]


def prompt(batch=2):
    return torch.randint(17, (batch, 11), generator=torch.Generator().manual_seed(0))


def test_a_model_with_every_score_term(worlds):
    expected = one_device(prompt())
    assert len(expected.unique()) > 8  # not one token over and over
    for size, kind in ((3, "striped"), (4, "zigzag")):
        for tokens in simulate(size, sharded, prompt(), kind):
            assert torch.equal(tokens, expected)
    for tokens in worlds.run(2, sharded, prompt(), "zigzag"):
        assert torch.equal(tokens, expected)
