"""What is looked up and of whom: models that split unlike their neighbours, and refusals, not guesses."""

from types import SimpleNamespace

import pytest
import transformers as hf

from seqpar.tensor_parallel import FusedQKV, check_split, known_layout


def config_of(name, **attributes):
    """A config of a model whose code is not shipped: a class of that name."""
    return type(name, (SimpleNamespace,), {})(**attributes)


SIZES = {"hidden_size": 32, "num_attention_heads": 4}
CHATGLM = config_of("ChatGLMConfig", **SIZES, position_encoding_2d=True, inner_hidden_size=64)
CHATGLM2 = {
    **SIZES,
    "kv_channels": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_bias_linear": False,
    "add_qkv_bias": True,
}
GLM = {**SIZES, "block_position_encoding": True}
MEGATRON = {**SIZES, "kv_channels": 16, "add_bias_linear": True, "add_qkv_bias": False}


def by_heads(x):  # of each head q, k and v
    return x.view(1, 1, 4, 3, -1).unbind(3)


def in_thirds(x):
    return x.chunk(3, -1)


def by_groups(x):  # two groups of two query heads and the k and v that serve them
    grouped = x.view(1, 1, 2, 4, -1)
    return grouped[..., :2, :], grouped[..., 2, :], grouped[..., 3, :]


OTHERS = {
    "ChatGLM-6B": (CHATGLM, "attention.query_key_value", by_heads),
    "ChatGLM2": (
        config_of("ChatGLMConfig", **CHATGLM2),
        "self_attention.query_key_value",
        lambda x: x.split([32, 16, 16], -1),
    ),
    "ChatGLM2, multi_query_attention off": (
        config_of("ChatGLMConfig", **{**CHATGLM2, "multi_query_attention": False}),
        "self_attention.query_key_value",
        by_heads,
    ),
    "GLM-10B": (config_of("GLMConfig", **GLM), "attention.query_key_value", in_thirds),
    "Qwen": (config_of("QWenConfig", **SIZES, kv_channels=8), "attn.c_attn", in_thirds),
    "Baichuan2": (config_of("BaichuanConfig", **SIZES), "self_attn.W_pack", in_thirds),
    "InternLM2": (
        config_of("InternLM2Config", **SIZES, num_key_value_heads=2, bias=False),
        "attention.wqkv",
        by_groups,
    ),
    "Megatron-Core": (
        config_of("TransformerConfig", **MEGATRON, num_query_groups=2),
        "self_attention.linear_qkv",
        by_groups,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_are_not_shipped_split_as_their_code_does(name):
    config, weight, split = OTHERS[name]
    layout = known_layout(config, f"layers.3.{weight}.bias")
    check_split(layout, split)
    assert layout == known_layout(config, weight.rpartition(".")[2])
    for other in (by_heads, in_thirds):
        if other is not split and layout.num_kv_heads == 4:
            with pytest.raises(ValueError, match="the split takes row"):
                check_split(layout, other)


def test_falcon_7b_has_one_kv_head_after_all_queries():
    layout = known_layout(hf.FalconConfig(), "h.0.self_attention.query_key_value.weight")
    assert (layout.num_heads, layout.num_kv_heads, layout.head_dim) == (71, 1, 64)
    assert layout.index("k", 0) == range(71 * 64, 72 * 64)


def test_falcon_40b_has_keys_between_its_queries():
    config = hf.FalconConfig(
        hidden_size=8192, num_attention_heads=128, num_kv_heads=8, new_decoder_architecture=True
    )
    assert known_layout(config, "query_key_value").index("k", 0) == range(16 * 64, 17 * 64)


def test_dbrx_is_not_split_as_mpt_though_the_weight_has_the_same_name():
    dbrx = hf.DbrxConfig(d_model=6144, n_heads=48, attn_config={"kv_n_heads": 8})
    mpt = hf.MptConfig(d_model=6144, n_heads=48)
    assert known_layout(dbrx, "attn.Wqkv").rows == 8192
    assert known_layout(mpt, "attn.Wqkv").rows == 3 * 6144


def test_modernbert_is_in_thirds_and_not_by_heads():
    assert known_layout(hf.ModernBertConfig(), "attn.Wqkv") == FusedQKV.contiguous(12, 64)


def test_the_two_chatglms_are_told_apart():
    later = known_layout(config_of("ChatGLMConfig", **CHATGLM2), "query_key_value")
    assert known_layout(CHATGLM, "query_key_value") == FusedQKV.per_head(4, 8, bias=True)
    assert later == FusedQKV.contiguous(4, 8, 2, bias=True)


def test_persimmon_is_by_heads():
    layout = known_layout(hf.PersimmonConfig(), "self_attn.query_key_value")
    assert layout == FusedQKV.per_head(64, 64, bias=True)


def test_bigcode_without_multi_query_is_by_heads_and_starcoder_in_parts():
    without, starcoder = (hf.GPTBigCodeConfig(multi_query=on) for on in (False, True))
    assert known_layout(without, "attn.c_attn") == FusedQKV.per_head(12, 64, bias=True)
    assert known_layout(starcoder, "attn.c_attn") == FusedQKV.contiguous(12, 64, 1, bias=True)


def test_codegen_has_v_before_k_in_four_blocks():
    layout = known_layout(hf.CodeGenConfig(), "attn.qkv_proj")
    assert layout == FusedQKV(16, 16, 256, blocks=4, order="qvk")
    assert layout.index("v", 0).start < layout.index("k", 0).start < layout.index("q", 4).start


@pytest.mark.parametrize("kv_heads", [None, 10])
def test_phi_takes_its_kv_heads_and_a_head_dim_of_its_own(kv_heads):
    config = hf.Phi3Config(hidden_size=80, num_attention_heads=40, num_key_value_heads=kv_heads)
    assert known_layout(config, "qkv_proj") == FusedQKV.contiguous(40, 2, kv_heads)
    config.head_dim = 4
    assert known_layout(config, "qkv_proj") == FusedQKV.contiguous(40, 4, kv_heads)


@pytest.mark.parametrize("on", [False, True])
def test_bias_is_as_the_config_says(on):
    neox, bert = hf.GPTNeoXConfig(attention_bias=on), hf.ModernBertConfig(attention_bias=on)
    assert known_layout(neox, "query_key_value").bias == on
    assert known_layout(bert, "Wqkv").bias == on
    megatron = config_of("TransformerConfig", **MEGATRON, num_query_groups=None)
    megatron.add_bias_linear = on
    assert known_layout(megatron, "linear_qkv") == FusedQKV.per_head(4, 16, bias=on)


def test_an_unknown_model_is_refused_though_its_weight_has_a_known_name():
    with pytest.raises(ValueError, match=r"no fused weight is known of a LlamaConfig, .*FusedQKV"):
        known_layout(hf.LlamaConfig(), "self_attention.query_key_value")
    with pytest.raises(ValueError, match="no fused weight is known of a GlmConfig"):
        known_layout(hf.GlmConfig(), "attention.query_key_value")


def test_a_derived_config_is_another_model():
    class MyConfig(hf.BloomConfig):
        pass

    with pytest.raises(ValueError, match="MyConfig, which is derived from BloomConfig but may"):
        known_layout(MyConfig(), "query_key_value")


@pytest.mark.parametrize(
    "weight",
    [
        "h.0.crossattention.c_attn.weight",
        "h.0.crossattention.q_attn.weight",
        "h.0.mlp.c_fc.weight",
        "h.0.attn.c_proj.weight",
        "h.0.attn.c_attn.lora_A.weight",
        "weight",
        "",
    ],
)
def test_other_weights_are_not_taken_for_q_k_and_v(weight):
    with pytest.raises(ValueError, match=r"not known to hold q, k and v .*attn.c_attn is known"):
        known_layout(hf.GPT2Config(add_cross_attention=True), weight)


def test_a_chatglm_of_neither_or_of_both_versions_is_refused():
    both = config_of("ChatGLMConfig", **CHATGLM2, position_encoding_2d=True)
    for config in (config_of("ChatGLMConfig", **SIZES), both):
        for weight in ("query_key_value", "attention.query_key_value"):
            with pytest.raises(ValueError, match=r"must be of one of ChatGLM-6B.*fit 0"):
                known_layout(config, weight)


@pytest.mark.parametrize("sizes", [SIZES, {**GLM, "num_key_value_heads": 2}])
def test_another_glm_is_not_taken_for_glm_10b(sizes):
    with pytest.raises(ValueError, match=r"must be of one of GLM-10B; its attributes fit 0"):
        known_layout(config_of("GLMConfig", **sizes), "attention.query_key_value")


@pytest.mark.parametrize(
    ("config", "weight", "message"),
    [
        (config_of("BaichuanConfig", hidden_size=32), "W_pack", "num_attention_heads"),
        (hf.BloomConfig(hidden_size=30, n_head=4), "query_key_value", "30 and 4"),
        (hf.CodeGenConfig(n_embd=60, n_head=6), "qkv_proj", "4 blocks"),
        (config_of("QWenConfig", **SIZES, kv_channels=16), "c_attn", "kv_channels must be"),
        (
            config_of("TransformerConfig", **MEGATRON, attention_output_gate=True),
            "linear_qkv",
            "gate",
        ),
    ],
)
def test_a_config_that_its_model_could_not_have_is_refused(config, weight, message):
    with pytest.raises(ValueError, match=message):
        known_layout(config, weight)


def test_check_split_names_the_row_that_differs():
    layout = FusedQKV.per_head(2, 2)
    with pytest.raises(ValueError, match=r"row 0 of q of head 1 is row 6 .* row 2, .*row 0 of k"):
        check_split(layout, in_thirds)
    with pytest.raises(ValueError, match="2 heads of 2 of q, the split gives 6 rows"):
        check_split(layout, lambda x: (x[..., :6], x[..., 6:9], x[..., 9:]))
    swapped = FusedQKV(4, 4, 1, order="qvk")
    with pytest.raises(ValueError, match=r"row 0 of k of head 0 is row 8 .*row 0 of v of head 0"):
        check_split(swapped, in_thirds)


def test_check_split_takes_keys_repeated_for_their_query_heads():
    layout = FusedQKV.per_group(4, 8, 2)

    def repeated(x):
        q, k, v = by_groups(x)
        return q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)

    check_split(layout, repeated)
    with pytest.raises(ValueError, match="row 0 of k of head 0 is row 16"):
        check_split(
            layout,
            lambda x: (by_groups(x)[0], *(y.repeat(1, 1, 2, 1) for y in by_groups(x)[2:0:-1])),
        )


def test_shipped_functions_that_split_can_be_asked_directly():
    bloom = hf.BloomConfig(hidden_size=16, n_head=4)
    attention = hf.models.bloom.modeling_bloom.BloomAttention(bloom, 0)
    check_split(known_layout(bloom, "query_key_value"), attention._reshape)
    falcon = hf.FalconConfig(
        hidden_size=32, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True
    )
    attention = hf.models.falcon.modeling_falcon.FalconAttention(falcon, 0)
    check_split(known_layout(falcon, "query_key_value"), attention._split_heads)
