"""The attention classes that can be replaced, read in transformers 5.17 to 5.24.

Their layouts of fused weights are `known_layout`'s. Scales and probabilities are read from a module at every
call, so that what is changed later counts.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from seqpar.integrations.transformers.replace.family import Family, Given
from seqpar.tensor_parallel.rotary import Angles, Rotary

SEPARATE = ("q_proj", "k_proj", "v_proj")


def _windowed(m: Any) -> dict[str, Any]:
    return {"scaling": m.scaling, "sliding_window": m.sliding_window}


def _windowed_by_config(m: Any) -> dict[str, Any]:
    return {"scaling": m.scaling, "sliding_window": getattr(m.config, "sliding_window", None)}


def _whole(m: Any) -> Rotary:
    return Rotary(m.head_dim)


def _part(m: Any) -> Rotary:
    return Rotary(m.rotary_ndims)


def _part_by_config(m: Any) -> Rotary:
    return Rotary(int(m.head_dim * m.config.rope_parameters.get("partial_rotary_factor", 1.0)))


def _cross(m: Any) -> str | None:
    return "cross attention" if m.is_cross_attention else None


def _residual_dropout(m: Any, y: Tensor, _: Given) -> Tensor:
    return m.resid_dropout(y)


def _step(alibi: Tensor) -> Tensor:
    """The slopes of a bias: what it grows by from one position to the next."""
    return (alibi[..., 1] - alibi[..., 0]).flatten()


def _function(m: Any, name: str) -> Any:
    """A function of the model's code."""
    return getattr(sys.modules[m.code], name)


def _bloom_slopes(m: Any) -> Tensor:
    seen = torch.ones(1, 2, dtype=torch.long)
    return _step(_function(m, "build_alibi_tensor")(seen, m.num_heads, torch.float64))


def _bloom_residual(m: Any, y: Tensor, given: Given) -> Tensor:
    return F.dropout(y, m.hidden_dropout, m.training) + given["residual"]


def _bloom_refused(m: Any) -> str | None:
    if m.pretraining_tp > 1 and m.slow_but_exact:
        return f"the output projection in slices (slow_but_exact with pretraining_tp={m.pretraining_tp})"
    return None


def _mpt_slopes(m: Any) -> Tensor:
    return _step(_function(m, "build_mpt_alibi_tensor")(m.n_heads, 2).double())


def _falcon_slopes(m: Any) -> Tensor | None:
    return _bloom_slopes(m) / math.sqrt(m.head_dim) if m.config.alibi else None


def _falcon_dropout(m: Any) -> float:
    return m.attention_dropout.p if m.config.alibi else 0.0  # it drops none beside rotary


def _has_own_table(m: Any) -> bool:
    """Whether CodeGen's module holds the table of its rotary, as before transformers 5.24."""
    return hasattr(m, "embed_positions")


def _codegen_angles_before(_: Rotary, m: Any, given: Given) -> Angles:
    at = given["position_ids"]
    m.embed_positions = m.embed_positions.to(at.device)
    sin, cos = m.embed_positions[at].chunk(2, -1)
    return cos, sin


def _codegen_angles(_: Rotary, __: Any, given: Given) -> Angles:
    sin, cos = given["position_embeddings"]  # the other way round than elsewhere
    return cos, sin


def _codegen_refused(m: Any) -> str | None:
    return "rotary_dim=None" if m.rotary_dim is None else None


_FALCON = Family(
    ("falcon.modeling_falcon.FalconAttention",), ("query_key_value",), "dense",
    terms=lambda m: {"scaling": m.inv_norm_factor},
    dropout=_falcon_dropout,
    rotary=lambda m: None if m.config.alibi else Rotary(m.head_dim),
    slopes=_falcon_slopes,
    takes=("alibi", "attention_mask"),
    switches=False,
)  # fmt: skip

_CODEGEN = Family(
    ("codegen.modeling_codegen.CodeGenAttention",), ("qkv_proj",), "out_proj",
    when=lambda m: not _has_own_table(m),
    rotary=lambda m: Rotary(m.rotary_dim, interleaved=True),
    angles=_codegen_angles,
    finish=_residual_dropout,
    refused=_codegen_refused,
    takes=("position_embeddings", "attention_mask"),
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (
    Family(
        ("bloom.modeling_bloom.BloomAttention",), ("query_key_value",), "dense",
        terms=lambda m: {"scaling": m.inv_norm_factor},
        dropout=lambda m: m.attention_dropout.p,
        slopes=_bloom_slopes,
        finish=_bloom_residual,
        refused=_bloom_refused,
        takes=("residual", "alibi", "attention_mask"),
        switches=False,
    ),
    Family(
        ("mpt.modeling_mpt.MptAttention",), ("Wqkv",), "out_proj",
        terms=lambda m: {"scaling": m.softmax_scale},
        dropout=lambda m: m.attn_dropout_p,
        slopes=_mpt_slopes,
        clip=lambda m: m.clip_qkv or None,
        takes=("position_bias", "past_key_values", "attention_mask"),
        switches=False,
    ),
    _FALCON,
    _CODEGEN,
    replace(
        _CODEGEN,
        when=_has_own_table,
        terms=lambda m: {"scaling": 1 / m.scale_attn},
        dropout=lambda m: m.attn_dropout.p,
        angles=_codegen_angles_before,
        takes=("layer_past", "attention_mask"),
        switches=False,
    ),
    Family(
        ("gpt_neox.modeling_gpt_neox.GPTNeoXAttention",), ("query_key_value",), "dense",
        rotary=_part,
        takes=("attention_mask",),
    ),
    Family(
        ("persimmon.modeling_persimmon.PersimmonAttention",), ("query_key_value",), "dense",
        norms=("q_layernorm", "k_layernorm"),
        dropout=lambda m: m.config.attention_dropout,
        rotary=_part,
        takes=("attention_mask",),
    ),
    Family(
        ("gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeAttention",), ("c_attn",), "c_proj",
        dropout=lambda m: m.attn_dropout,
        finish=_residual_dropout,
        refused=_cross,
        takes=("layer_past", "attention_mask"),
    ),
    Family(
        ("gpt2.modeling_gpt2.GPT2Attention",), ("c_attn",), "c_proj",
        dropout=lambda m: m.attn_dropout.p,
        finish=_residual_dropout,
        refused=_cross,
        takes=("past_key_values", "attention_mask"),
    ),
    Family(
        ("modernbert.modeling_modernbert.ModernBertAttention",), ("Wqkv",), "Wo",
        terms=lambda m: {"scaling": m.head_dim**-0.5, "sliding_window": m.sliding_window},
        rotary=_whole,
        finish=lambda m, y, _: m.out_drop(y),
        takes=("position_embeddings", "attention_mask"),
    ),
    Family(
        ("phi3.modeling_phi3.Phi3Attention",), ("qkv_proj",), "o_proj",
        terms=_windowed_by_config,
        rotary=_part_by_config,
        takes=("position_embeddings", "attention_mask"),
    ),
    Family(
        ("dbrx.modeling_dbrx.DbrxAttention",), ("Wqkv",), "out_proj",
        rotary=_whole,
        clip=lambda m: m.clip_qkv,
        takes=("attention_mask", "position_embeddings"),
    ),
    Family(
        ("llama.modeling_llama.LlamaAttention", "gemma.modeling_gemma.GemmaAttention"),
        SEPARATE, "o_proj",
        rotary=_whole,
        takes=("position_embeddings", "attention_mask"),
    ),
    Family(
        ("mistral.modeling_mistral.MistralAttention",), SEPARATE, "o_proj",
        terms=_windowed_by_config,
        rotary=_whole,
        takes=("position_embeddings", "attention_mask"),
    ),
    Family(
        ("qwen2.modeling_qwen2.Qwen2Attention",), SEPARATE, "o_proj",
        terms=_windowed,
        rotary=_whole,
        takes=("position_embeddings", "attention_mask"),
    ),
    Family(
        ("gemma2.modeling_gemma2.Gemma2Attention",), SEPARATE, "o_proj",
        terms=lambda m: _windowed(m) | {"softcap": m.attn_logit_softcapping},
        rotary=_whole,
        takes=("position_embeddings", "attention_mask"),
    ),
    Family(
        ("qwen3.modeling_qwen3.Qwen3Attention",), SEPARATE, "o_proj",
        norms=("q_norm", "k_norm"),
        terms=_windowed,
        rotary=_whole,
        takes=("position_embeddings", "attention_mask"),
    ),
)  # fmt: skip
