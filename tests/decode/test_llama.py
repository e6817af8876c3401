"""A Llama of transformers decodes over sharded caches what it generates by itself on one device."""

import pytest
import torch

from seqpar import KVCache, Mask, RingAttention, contiguous, simulate, zigzag

transformers = pytest.importorskip("transformers")
NAME, TOKENS, CAUSAL = "seqpar_decode_test", 16, Mask(causal=True)


def cached_attention(module, q, k, v, attention_mask, scaling=None, caches=None, **_):  # noqa: ARG001
    """What transformers calls in every layer, with [b h s d]; `caches` come from the caller of the model."""
    assert scaling == pytest.approx(module.head_dim**-0.5)
    out = caches(module.layer_idx, *(x.transpose(1, 2) for x in (q, k, v)))
    return out, None


@pytest.fixture(scope="module")
def model():
    transformers.AttentionInterface.register(NAME, cached_attention)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def sharded(group, model, prompt, make_layout):
    layout, caches = make_layout(prompt.shape[1] - 1, group.size), {}

    def attend(layer, q, k, v):
        if layer in caches:
            return caches[layer].step(q, k, v)
        ring = RingAttention(group, mask=CAUSAL)
        caches[layer] = KVCache(group, layout, k, v, mask=CAUSAL)
        return ring(q, k, v, layout)

    mine = layout.positions(group.rank)
    model(prompt[:, mine], position_ids=mine[None], use_cache=False, caches=attend)
    ids = prompt
    for n in range(TOKENS):
        position = torch.tensor([[layout.length + n]])
        logits = model(ids[:, -1:], position_ids=position, use_cache=False, caches=attend).logits
        ids = torch.cat((ids, logits.argmax(-1)), dim=1)
    return ids


def test_llama_generates_the_same(model):
    prompt = torch.randint(61, (1, 13), generator=torch.Generator().manual_seed(1))
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert len(expected[0, 13:].unique()) > 4
    model.set_attn_implementation(NAME)
    for size, make_layout in ((2, zigzag), (3, contiguous)):
        for ids in simulate(size, sharded, model, prompt, make_layout):
            assert torch.equal(ids, expected)
