"""The fused weights that are known: of which config, under which name, laid out how, by which code.

Rows are data and read a config as the model does; that of transformers is not imported. Sources are those of
transformers 5.23 for `SHIPPED`, and of the models' own repositories for `OTHERS`. Not here: vision encoders,
attention that is not a softmax (MiniMax's `qkv_proj`), and projections that hold more than q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from seqpar.tensor_parallel.fused_qkv import FusedQKV

Kind = Literal["per head", "contiguous", "contiguous, grouped", "per group", "four blocks, q v k"]


def _always(config: Any) -> bool:  # noqa: ARG001
    return True


@dataclass(frozen=True)
class KnownModel:
    """A fused weight of a model, or of one of its variants.

    Args:
        name: of the model, and of the variant where its config decides.
        configs: names of its config's class.
        weight: the end of the weight's path.
        kind: of layout, in words.
        source: the file and function that split it.
        read: its layout, from a config.
        when: whether a config is of this variant.
    """

    name: str
    configs: tuple[str, ...]
    weight: str
    kind: Kind
    source: str
    read: Callable[[Any], FusedQKV]
    when: Callable[[Any], bool] = _always

    def is_weight(self, path: list[str]) -> bool:
        """Whether a path, as far as it is given, ends in this weight's name."""
        own = self.weight.split(".")
        both = min(len(own), len(path))
        return path[-both:] == own[-both:]


def _heads(c: Any) -> tuple[int, int]:
    """How many heads there are and how wide each is, of a config that gives the width of all."""
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads, got {c.hidden_size} and "
            f"{c.num_attention_heads}"
        )
    return c.num_attention_heads, c.hidden_size // c.num_attention_heads


def _flag(c: Any, bias: str | bool) -> bool:
    """Whether there is a bias: it is fixed, or an attribute of the config says so."""
    return bias if isinstance(bias, bool) else bool(getattr(c, bias))


def _per_head(bias: str | bool) -> Callable[[Any], FusedQKV]:
    return lambda c: FusedQKV.per_head(*_heads(c), bias=_flag(c, bias))


def _contiguous(
    bias: str | bool, kv: int | None = None, transposed: bool = False
) -> Callable[[Any], FusedQKV]:
    return lambda c: FusedQKV.contiguous(*_heads(c), kv, bias=_flag(c, bias), transposed=transposed)


def _falcon_40b(c: Any) -> FusedQKV:
    return FusedQKV.per_group(*_heads(c), c.num_kv_heads, bias=bool(c.bias))


def _phi3(c: Any) -> FusedQKV:
    head_dim = getattr(c, "head_dim", None) or _heads(c)[1]
    return FusedQKV.contiguous(c.num_attention_heads, head_dim, c.num_key_value_heads)


def _dbrx(c: Any) -> FusedQKV:
    return FusedQKV.contiguous(*_heads(c), c.attn_config.kv_n_heads)


def _codegen(c: Any) -> FusedQKV:
    heads, head_dim = _heads(c)
    return FusedQKV(heads, heads, head_dim, blocks=4, order="qvk")


def _qwen(c: Any) -> FusedQKV:
    heads, head_dim = _heads(c)
    if c.kv_channels != head_dim:
        raise ValueError(
            f"kv_channels must be hidden_size / num_attention_heads = {head_dim}, as the model splits at "
            f"hidden_size, got {c.kv_channels}"
        )
    return FusedQKV.contiguous(heads, head_dim, bias=True)


def _is_chatglm(c: Any, version: int) -> bool:
    """Whether a config is of ChatGLM-6B or of its successors, which have the class's name in common."""
    first, later = hasattr(c, "position_encoding_2d"), hasattr(c, "multi_query_attention")
    return first != later and first == (version == 1)


def _is_glm(c: Any) -> bool:
    """Whether a config is of GLM-10B, and not of a later model whose class has the same name."""
    return hasattr(c, "block_position_encoding") and not hasattr(c, "num_key_value_heads")


def _chatglm2(c: Any) -> FusedQKV:
    bias = bool(c.add_bias_linear or c.add_qkv_bias)
    if not c.multi_query_attention:
        return FusedQKV.per_head(c.num_attention_heads, c.kv_channels, bias=bias)
    kv = c.multi_query_group_num
    return FusedQKV.contiguous(c.num_attention_heads, c.kv_channels, kv, bias=bias)


def _internlm2(c: Any) -> FusedQKV:
    return FusedQKV.per_group(*_heads(c), c.num_key_value_heads, bias=bool(c.bias))


def _megatron(c: Any) -> FusedQKV:
    if getattr(c, "attention_output_gate", False):
        raise ValueError(
            "linear_qkv holds a gate beside q, k and v where attention_output_gate is set"
        )
    bias = bool(c.add_bias_linear or c.add_qkv_bias)
    groups = c.num_query_groups or c.num_attention_heads
    return FusedQKV.per_group(c.num_attention_heads, c.kv_channels, groups, bias=bias)


def _shipped(model: str, function: str) -> str:
    return f"transformers/models/{model}/modeling_{model}.py, {function}"


_FALCON = _shipped("falcon", "FalconAttention._split_heads")
_BIGCODE = _shipped("gpt_bigcode", "GPTBigCodeAttention.forward")
_CHATGLM2 = "THUDM/chatglm2-6b, THUDM/chatglm3-6b: modeling_chatglm.py, SelfAttention.forward"
_DT = "DecisionTransformerGPT2Attention.forward"
_JAPANESE = "GPTNeoXJapaneseAttention.forward"

# fmt: off
SHIPPED: tuple[KnownModel, ...] = (
    KnownModel("Bloom", ("BloomConfig",), "self_attention.query_key_value", "per head",
               _shipped("bloom", "BloomAttention._reshape"), _per_head(bias=True)),
    KnownModel("GPT-NeoX", ("GPTNeoXConfig",), "attention.query_key_value", "per head",
               _shipped("gpt_neox", "GPTNeoXAttention.forward"), _per_head("attention_bias")),
    KnownModel("GPT-NeoX-Japanese", ("GPTNeoXJapaneseConfig",), "attention.query_key_value", "per head",
               _shipped("gpt_neox_japanese", _JAPANESE), _per_head(bias=False)),
    KnownModel("Persimmon", ("PersimmonConfig",), "self_attn.query_key_value", "per head",
               _shipped("persimmon", "PersimmonAttention._split_heads"), _per_head(bias=True)),
    KnownModel("DeBERTa", ("DebertaConfig",), "self.in_proj", "per head",  # q_bias, v_bias are apart
               _shipped("deberta", "DisentangledSelfAttention.forward"), _per_head(bias=False)),
    KnownModel("Falcon, multi_query off", ("FalconConfig",), "self_attention.query_key_value", "per head",
               _FALCON, _per_head("bias"), lambda c: not (c.new_decoder_architecture or c.multi_query)),
    KnownModel("Falcon-7B: multi_query", ("FalconConfig",), "self_attention.query_key_value",
               "contiguous, grouped", _FALCON, _contiguous("bias", kv=1),
               lambda c: bool(c.multi_query and not c.new_decoder_architecture)),
    KnownModel("Falcon-40B: new_decoder_architecture", ("FalconConfig",), "self_attention.query_key_value",
               "per group", _FALCON, _falcon_40b, lambda c: bool(c.new_decoder_architecture)),
    KnownModel("GPT-BigCode, multi_query off", ("GPTBigCodeConfig",), "attn.c_attn", "per head",
               _BIGCODE, _per_head(bias=True), lambda c: not c.multi_query),
    KnownModel("GPT-BigCode (StarCoder): multi_query", ("GPTBigCodeConfig",), "attn.c_attn",
               "contiguous, grouped", _BIGCODE, _contiguous(bias=True, kv=1), lambda c: bool(c.multi_query)),
    KnownModel("MPT", ("MptConfig",), "attn.Wqkv", "contiguous",
               _shipped("mpt", "MptAttention.forward"), _contiguous(bias=False)),
    KnownModel("ModernBERT", ("ModernBertConfig",), "attn.Wqkv", "contiguous",
               _shipped("modernbert", "ModernBertAttention.forward"), _contiguous("attention_bias")),
    KnownModel("GPT-2", ("GPT2Config",), "attn.c_attn", "contiguous",
               _shipped("gpt2", "GPT2Attention.forward"), _contiguous(bias=True, transposed=True)),
    KnownModel("GPT", ("OpenAIGPTConfig",), "attn.c_attn", "contiguous",
               _shipped("openai", "Attention.forward"), _contiguous(bias=True, transposed=True)),
    KnownModel("ImageGPT", ("ImageGPTConfig",), "attn.c_attn", "contiguous",
               _shipped("imagegpt", "ImageGPTAttention.forward"), _contiguous(bias=True, transposed=True)),
    KnownModel("Decision Transformer", ("DecisionTransformerConfig",), "attn.c_attn", "contiguous",
               _shipped("decision_transformer", _DT), _contiguous(bias=True, transposed=True)),
    KnownModel("Bark", ("BarkSemanticConfig", "BarkCoarseConfig", "BarkFineConfig"), "attn.att_proj",
               "contiguous", _shipped("bark", "BarkSelfAttention.forward"), _contiguous("bias")),
    KnownModel("Phi-3, Phi-4", ("Phi3Config",), "self_attn.qkv_proj", "contiguous, grouped",
               _shipped("phi3", "Phi3Attention.forward"), _phi3),
    KnownModel("Phi-4-multimodal", ("Phi4MultimodalConfig",), "self_attn.qkv_proj", "contiguous, grouped",
               _shipped("phi4_multimodal", "Phi4MultimodalAttention.forward"), _phi3),
    KnownModel("DBRX", ("DbrxConfig",), "attn.Wqkv", "contiguous, grouped",
               _shipped("dbrx", "DbrxAttention.forward"), _dbrx),
    KnownModel("CodeGen", ("CodeGenConfig",), "attn.qkv_proj", "four blocks, q v k",
               _shipped("codegen", "CodeGenAttention.forward"), _codegen),
)
OTHERS: tuple[KnownModel, ...] = (
    KnownModel("ChatGLM-6B", ("ChatGLMConfig",), "attention.query_key_value", "per head",
               "THUDM/chatglm-6b: modeling_chatglm.py, SelfAttention.forward", _per_head(bias=True),
               lambda c: _is_chatglm(c, 1)),
    KnownModel("ChatGLM2, ChatGLM3: multi_query_attention", ("ChatGLMConfig",),
               "self_attention.query_key_value", "contiguous, grouped", _CHATGLM2, _chatglm2,
               lambda c: _is_chatglm(c, 2) and bool(c.multi_query_attention)),
    KnownModel("ChatGLM2, ChatGLM3, multi_query_attention off", ("ChatGLMConfig",),
               "self_attention.query_key_value", "per head", _CHATGLM2, _chatglm2,
               lambda c: _is_chatglm(c, 2) and not c.multi_query_attention),
    KnownModel("GLM-10B", ("GLMConfig",), "attention.query_key_value", "contiguous",
               "THUDM/glm-10b: modeling_glm.py, SelfAttention.forward", _contiguous(bias=True), _is_glm),
    KnownModel("Qwen", ("QWenConfig",), "attn.c_attn", "contiguous",
               "Qwen/Qwen-7B: modeling_qwen.py, QWenAttention.forward", _qwen),
    KnownModel("Baichuan, Baichuan2", ("BaiChuanConfig", "BaichuanConfig"), "self_attn.W_pack", "contiguous",
               "baichuan-inc/Baichuan2-7B-Base: modeling_baichuan.py, Attention.forward",
               _contiguous(bias=False)),
    KnownModel("InternLM2", ("InternLM2Config",), "attention.wqkv", "per group",
               "internlm/internlm2-7b: modeling_internlm2.py, InternLM2Attention.forward", _internlm2),
    KnownModel("Megatron-Core", ("TransformerConfig",), "self_attention.linear_qkv", "per group",
               "NVIDIA/Megatron-LM: megatron/core/transformer/attention.py, "
               "SelfAttention.get_query_key_value_tensors", _megatron),
)
# fmt: on
