"""Attention of the shards, each rank its heads, sums to that of the whole weight, as the model splits it."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
import transformers as hf

from seqpar.tensor_parallel import known_layout

EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64: only the summation order differs
D, E, S = 2, 6, 4


def glm(heads):
    sizes = {"hidden_size": heads * D, "num_attention_heads": heads}
    return type("GLMConfig", (SimpleNamespace,), {})(**sizes, block_position_encoding=True)


def in_thirds(y, heads, kv):  # noqa: ARG001
    return [part.unflatten(-1, (heads, D)) for part in y.chunk(3, -1)]


def by_heads(y, heads, kv):  # noqa: ARG001
    return y.unflatten(-1, (heads, 3, D)).unbind(-2)


def codegen(y, heads, kv):  # noqa: ARG001
    q, v, k = y.unflatten(-1, (4, 3, -1)).unbind(-2)
    return [part.flatten(-2).unflatten(-1, (heads, D)) for part in (q, k, v)]


def in_parts(y, heads, kv):
    parts = y.split([heads * D, kv * D, kv * D], -1)
    return [part.unflatten(-1, (-1, D)) for part in parts]


def by_groups(y, heads, kv):
    grouped = y.unflatten(-1, (kv, heads // kv + 2, D))
    return grouped[..., :-2, :].flatten(-3, -2), grouped[..., -2, :], grouped[..., -1, :]


# (config, weight, how its model splits, sizes); 3 and 5 ranks are tried with all
MODELS = {
    "GLM-10B": (glm(64), "query_key_value", in_thirds, (1, 2, 4, 8)),
    "CodeGen-2B's 16 heads": (
        hf.CodeGenConfig(n_embd=16 * D, n_head=16),
        "qkv_proj",
        codegen,
        (1, 2, 4),
    ),
    "CodeGen-16B's 24 heads": (
        hf.CodeGenConfig(n_embd=24 * D, n_head=24),
        "qkv_proj",
        codegen,
        (1, 2, 6),
    ),
    "Bloom-7B": (
        hf.BloomConfig(hidden_size=32 * D, n_head=32),
        "query_key_value",
        by_heads,
        (1, 2, 4, 8),
    ),
    "Falcon-7B": (
        hf.FalconConfig(hidden_size=71 * D, num_attention_heads=71),
        "query_key_value",
        in_parts,
        (4, 71),
    ),
    "Falcon-40B": (
        hf.FalconConfig(
            hidden_size=128 * D,
            num_attention_heads=128,
            num_kv_heads=8,
            new_decoder_architecture=True,
        ),
        "query_key_value",
        by_groups,
        (8, 16),
    ),
    "Phi-3-medium": (
        hf.Phi3Config(hidden_size=40 * D, num_attention_heads=40, num_key_value_heads=10),
        "qkv_proj",
        in_parts,
        (4, 20),
    ),
}
CASES = [(name, size) for name in MODELS for size in sorted({*MODELS[name][-1], 3, 5})]


def attend(q, k, v):
    """[s h d] -> [s (h d)], causal, dense."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / D**0.5
    scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_sum_over_ranks_equals_the_whole_with_all_gradients(name, size):
    config, weight, split, _ = MODELS[name]
    layout = known_layout(config, weight)
    heads, kv, group = (
        layout.num_heads,
        layout.num_kv_heads,
        layout.num_heads // layout.num_kv_heads,
    )
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    x, fused, bias, out = draw(S, E), draw(layout.rows, E), draw(layout.rows), draw(heads * D, E)
    want = attend(*split(x @ fused.T + bias, heads, kv)) @ out

    got, dealt = 0, layout.deal(size)
    for rank in range(size):
        mine = layout.shard(fused, rank, size), layout.shard(bias, rank, size)
        (start, stop), (kv_start, kv_stop) = dealt.q[rank], dealt.kv[rank]
        q, k, v = in_parts(x @ mine[0].T + mine[1], stop - start, kv_stop - kv_start)
        serving = (
            torch.arange(start, stop) // group - kv_start
        )  # the kv head of each query head here
        got = got + attend(q, k[:, serving], v[:, serving]) @ out[start * D : stop * D]

    torch.testing.assert_close(got, want, **EXACT)
    leaves, dout = (x, fused, bias, out), torch.randn_like(want)
    grads = torch.autograd.grad(got, leaves, dout)
    for got_grad, want_grad in zip(grads, torch.autograd.grad(want, leaves, dout), strict=True):
        torch.testing.assert_close(got_grad, want_grad, **EXACT)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_shards_merge_to_the_same_bits(name, size):
    layout = known_layout(*MODELS[name][:2])
    for shape, dtype in product(
        [(layout.rows, E), (layout.rows,)], [torch.float32, torch.bfloat16]
    ):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(layout.merge([layout.shard(x, r, size) for r in range(size)]), x)
