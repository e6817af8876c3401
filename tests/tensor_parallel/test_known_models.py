"""Known layouts are those of the models' own code: every model that transformers ships is asked itself."""

from itertools import permutations

import pytest
import torch
import transformers as hf
from transformers.models.bark.modeling_bark import BarkSelfAttention
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAttention

from seqpar.tensor_parallel import FusedQKV, check_layout, known_layout, known_models
from seqpar.tensor_parallel.model_rows import SHIPPED

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 8}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 8, "n_positions": 8}
BARK = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 4,
    "block_size": 8,
    "input_vocab_size": 8,
    "output_vocab_size": 8,
}


def falcon(**variant):
    config = hf.FalconConfig(**SMALL, **variant)
    return config, "h.0.self_attention.query_key_value", "h.0.self_attention.dense"


def bigcode(**variant):
    return hf.GPTBigCodeConfig(**GPT, **variant), "h.0.attn.c_attn", "h.0.attn.c_proj"


FAMILIES = {
    "Bloom": lambda: (
        hf.BloomConfig(**SMALL),
        "h.0.self_attention.query_key_value",
        "h.0.self_attention.dense",
    ),
    "Falcon, multi_query off": lambda: falcon(multi_query=False, alibi=True),
    "Falcon-7B: multi_query": lambda: falcon(multi_query=True, bias=True),
    "Falcon-40B: new_decoder_architecture": lambda: falcon(
        new_decoder_architecture=True, num_kv_heads=2
    ),
    "GPT-BigCode, multi_query off": lambda: bigcode(multi_query=False),
    "GPT-BigCode (StarCoder): multi_query": lambda: bigcode(multi_query=True),
    "GPT-NeoX": lambda: (
        hf.GPTNeoXConfig(**SMALL, intermediate_size=16),
        "layers.0.attention.query_key_value",
        "layers.0.attention.dense",
    ),
    "GPT-NeoX-Japanese": lambda: (
        hf.GPTNeoXJapaneseConfig(**SMALL, intermediate_multiple_size=1),
        "layers.0.attention.query_key_value",
        "layers.0.attention.dense",
    ),
    "Persimmon": lambda: (
        hf.PersimmonConfig(**SMALL, intermediate_size=16),
        "layers.0.self_attn.query_key_value",
        "layers.0.self_attn.dense",
    ),
    "DeBERTa": lambda: (
        hf.DebertaConfig(
            **SMALL,
            intermediate_size=16,
            relative_attention=True,
            pos_att_type="c2p|p2c",
            max_position_embeddings=8,
        ),
        "encoder.layer.0.attention.self.in_proj",
        "encoder.layer.0.attention.output.dense",
    ),
    "MPT": lambda: (
        hf.MptConfig(
            d_model=16,
            n_heads=4,
            n_layers=1,
            vocab_size=8,
            max_seq_len=8,
            expansion_ratio=1,
            attn_config={"clip_qkv": 1.0},
        ),
        "blocks.0.attn.Wqkv",
        "blocks.0.attn.out_proj",
    ),
    "ModernBERT": lambda: (
        hf.ModernBertConfig(
            **SMALL, intermediate_size=16, pad_token_id=0, global_attn_every_n_layers=1
        ),
        "layers.0.attn.Wqkv",
        "layers.0.attn.Wo",
    ),
    "GPT-2": lambda: (hf.GPT2Config(**GPT), "h.0.attn.c_attn", "h.0.attn.c_proj"),
    "GPT": lambda: (hf.OpenAIGPTConfig(**GPT), "h.0.attn.c_attn", "h.0.attn.c_proj"),
    "ImageGPT": lambda: (hf.ImageGPTConfig(**GPT), "h.0.attn.c_attn", "h.0.attn.c_proj"),
    "Decision Transformer": lambda: (
        hf.DecisionTransformerConfig(hidden_size=16, n_layer=1, n_head=4, n_positions=8),
        "encoder.h.0.attn.c_attn",
        "encoder.h.0.attn.c_proj",
    ),
    "Bark": lambda: (
        hf.BarkSemanticConfig(**BARK),
        "layers.0.attn.att_proj",
        "layers.0.attn.out_proj",
    ),
    "Phi-3, Phi-4": lambda: (
        hf.Phi3Config(**SMALL, num_key_value_heads=2, intermediate_size=16, pad_token_id=0),
        "layers.0.self_attn.qkv_proj",
        "layers.0.self_attn.o_proj",
    ),
    "DBRX": lambda: (
        hf.DbrxConfig(
            d_model=16,
            n_heads=4,
            n_layers=1,
            vocab_size=8,
            max_seq_len=8,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            ffn_config={"ffn_hidden_size": 16, "hidden_size": 16},
        ),
        "blocks.0.norm_attn_norm.attn.Wqkv",
        "blocks.0.norm_attn_norm.attn.out_proj",
    ),
    "CodeGen": lambda: (
        hf.CodeGenConfig(**{**GPT, "n_embd": 32, "n_head": 8}, rotary_dim=4),
        "h.0.attn.qkv_proj",
        "h.0.attn.out_proj",
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def asked(request):
    """A tiny model of each family: (its layout as known, what check_layout needs to ask it)."""
    torch.manual_seed(0)
    config, fused, out = FAMILIES[request.param]()
    if isinstance(config, hf.BarkSemanticConfig):
        model = hf.BarkSemanticModel(config).eval()
    else:
        model = hf.AutoModel.from_config(config).eval()
    ids = torch.arange(5)[None] + 1
    call = lambda: model(ids)  # noqa: E731
    if isinstance(config, hf.DecisionTransformerConfig):
        call = lambda: model.encoder(inputs_embeds=torch.zeros(1, 5, 16))  # noqa: E731
    return known_layout(config, fused), {"module": model, "fused": fused, "out": out, "call": call}


def kind_of(layout):
    """The kind of a layout in words, by the numbers only."""
    if layout.order == "qvk":
        return "four blocks, q v k"
    if layout.blocks == layout.num_heads:
        return "per head"
    grouped = layout.num_kv_heads < layout.num_heads
    if layout.blocks > 1:
        return "per group"
    return "contiguous, grouped" if grouped else "contiguous"


def same_as(layout):
    """What two layouts have in common if they are the same one."""
    rows = torch.cat(layout.split(torch.arange(layout.rows)))
    return layout.num_heads, layout.num_kv_heads, tuple(rows.tolist())


def impostors(right):
    """Every other order of as many rows, and the same orders of wider and of narrower heads."""
    hq, kv, d = right.num_heads, right.num_kv_heads, right.head_dim
    shapes = [(hq, kv, d, order) for order in map("".join, permutations("qkv"))]
    shapes.append((hq * 2, kv * 2, d // 2, right.order))
    if kv % 2 == 0:
        shapes.append((hq // 2, kv // 2, d * 2, right.order))
    rest = {"bias": right.bias, "transposed": right.transposed}
    layouts = [
        FusedQKV(hq, kv, d, blocks, order, **rest)
        for hq, kv, d, order in shapes
        for blocks in range(1, kv + 1)
        if kv % blocks == 0
    ]
    others = {same_as(layout): layout for layout in layouts}
    del others[same_as(right)]
    return others.values()


def test_layout_is_that_of_the_models_own_forward(asked):
    layout, how = asked
    check_layout(layout, **how)


def test_every_other_order_of_as_many_rows_is_refused(asked):
    layout, how = asked
    for impostor in impostors(layout):
        with pytest.raises(ValueError, match=r"by the layout|narrower"):
            check_layout(impostor, **how)


@pytest.mark.parametrize(
    ("name", "config", "fused", "out"),
    [
        ("Bark", hf.BarkFineConfig(**BARK), "att_proj", "out_proj"),
        (
            "Phi-4-multimodal",
            hf.Phi4MultimodalConfig(**SMALL, num_key_value_heads=2, pad_token_id=0),
            "qkv_proj",
            "o_proj",
        ),
    ],
)
def test_attention_can_be_asked_without_its_model(name, config, fused, out):
    hidden, rotary = torch.zeros(1, 5, 16), (torch.rand(1, 5, 4), torch.rand(1, 5, 4))
    config._attn_implementation = "eager"
    if name == "Bark":  # the fine model attends both ways
        attention = BarkSelfAttention(config).eval()
        call = lambda: attention(hidden)  # noqa: E731
    else:
        attention = Phi4MultimodalAttention(config, 0).eval()
        call = lambda: attention(hidden, rotary, None)  # noqa: E731
    layout = known_layout(config, fused)
    check_layout(layout, attention, fused=fused, out=out, call=call)
    for impostor in impostors(layout):
        with pytest.raises(ValueError, match=r"by the layout|narrower"):
            check_layout(impostor, attention, fused=fused, out=out, call=call)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_kind_in_words_is_that_of_the_numbers(name):
    config, weight, _ = FAMILIES[name]()
    row = next(row for row in SHIPPED if row.name == name)
    assert type(config).__name__ in row.configs
    assert kind_of(known_layout(config, weight)) == row.kind


def test_every_shipped_model_is_asked():
    assert {row.name for row in SHIPPED} == {*FAMILIES, "Phi-4-multimodal"}
    names = [row.name for row in known_models()]
    assert len(names) == len(set(names))
