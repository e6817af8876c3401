"""T5's own attention layers over several ranks, by `seqpar.biases.t5`."""

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

import seqpar
from seqpar import Mask, Score, biases, simulate

N = 61


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (32, 33), (7, 19)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(bidirectional, num_buckets, max_distance):
    """Also of distances that are farther than the bias reaches."""
    distance = torch.arange(-2 * max_distance, 2 * max_distance + 1)
    want = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    table = torch.arange(num_buckets).double()[:, None]
    (got,) = biases.t5(table, bidirectional=bidirectional, max_distance=max_distance)
    assert torch.equal(got[distance.clamp(-max_distance, max_distance) + max_distance], want)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
@pytest.mark.parametrize("is_decoder", [False, True])
def test_equals_a_layer_of_t5(is_decoder, strategy):
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=4, num_heads=4, relative_attention_num_buckets=8, dropout_rate=0.0,
        relative_attention_max_distance=20, is_decoder=is_decoder,
    )  # fmt: skip
    layer = T5Attention(config, has_relative_attention_bias=True).double()
    table = layer.relative_attention_bias.weight
    x, dout = torch.randn(2, 2, N, 16, dtype=torch.float64)
    mask = Mask(causal=is_decoder)
    hidden = torch.zeros(N, N, dtype=torch.float64)
    if is_decoder:
        hidden.masked_fill_(torch.ones(N, N).triu(1).bool(), torch.finfo(torch.float64).min)
    out = layer(x, mask=hidden[None, None])[0]
    (want,) = torch.autograd.grad(out, table, dout)

    def on_rank(group):
        layout = seqpar.zigzag(N, group.size)
        mine = layout.positions(group.rank)
        q, k, v = (p(x[:, mine]).unflatten(-1, (4, 4)) for p in (layer.q, layer.k, layer.v))
        bias = biases.t5(table, bidirectional=not is_decoder, max_distance=20)
        plan = seqpar.Plan(group, layout, mask, Score(scale=1.0, relative_bias=bias), strategy)
        rows = layer.o(seqpar.attention(q, k, v, plan).flatten(2))
        (share,) = torch.autograd.grad(rows, table, dout[:, mine])
        return rows.detach(), share

    found = simulate(3, on_rank)
    layout = seqpar.zigzag(N, 3)
    for rank, (rows, _) in enumerate(found):
        torch.testing.assert_close(
            rows, out[:, layout.positions(rank)].detach(), rtol=0, atol=1e-11
        )
    torch.testing.assert_close(sum(share for _, share in found), want, rtol=1e-10, atol=1e-10)
