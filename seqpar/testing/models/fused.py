"""Families whose attention is replaced: tiny models, an exact reference, a step on a tp x sp grid."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.bloom import modeling_bloom
from transformers.models.falcon import modeling_falcon
from transformers.models.gpt_bigcode import modeling_gpt_bigcode  # noqa: F401 - which compiles softmax as it is
from transformers.models.mpt import modeling_mpt

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.testing.models.tiny import ALTERNATING, SIZES, Family
from seqpar.testing.models.training_step import Step, attend_by

WIDE = SIZES | {"hidden_size": 48, "num_attention_heads": 12}  # heads of 4
GROUPED = WIDE | {"num_key_value_heads": 4, "head_dim": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FALCON = WIDE | SPECIAL | {"bias": True}
GPT: dict[str, Any] = {"vocab_size": 64, "n_embd": 48, "n_layer": 2, "n_head": 12}
GPT |= {"n_positions": 64} | SPECIAL | NO_DROPOUT
MPT = {"attn_config": {"clip_qkv": 0.6, "softmax_scale": 0.4}}
DBRX = {"attn_config": {"kv_n_heads": 4, "clip_qkv": 0.6, "rope_theta": 1e4}}
DBRX |= {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1}}
MODERNBERT = {"local_attention": 10, "layer_types": ["sliding_attention", "full_attention"]}
MODERNBERT |= {"cls_token_id": 1, "sep_token_id": 2, "attention_bias": True}


def _causal(name: str, options: dict[str, Any], suffix: str = "ForCausalLM") -> Family:
    return Family(name + suffix, f"{name}Config", options)


FUSED = {
    "bloom": _causal("Bloom", WIDE | {"n_layer": 2, "n_head": 12} | SPECIAL),
    "falcon_7b": _causal("Falcon", FALCON),
    "falcon_40b": _causal("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 4}),
    "falcon_rw": _causal(
        "Falcon", FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False}
    ),
    "codegen": _causal("CodeGen", GPT | {"rotary_dim": 2}),
    "mpt": _causal(
        "Mpt", {"vocab_size": 64, "d_model": 48, "n_layers": 2, "n_heads": 12, "max_seq_len": 64} | MPT
    ),
    "gpt_neox": _causal("GPTNeoX", WIDE | SPECIAL | {"rotary_pct": 0.5}),
    "persimmon": _causal("Persimmon", WIDE | SPECIAL),
    "gpt_bigcode": _causal("GPTBigCode", GPT),
    "gpt_bigcode_mha": _causal("GPTBigCode", GPT | {"multi_query": False}),
    "gpt2": _causal("GPT2", GPT | {"scale_attn_by_inverse_layer_idx": True}, "LMHeadModel"),
    "modernbert": Family(
        "ModernBertForMaskedLM", "ModernBertConfig", WIDE | SPECIAL | MODERNBERT, "own"
    ),
    "phi3_medium": _causal(
        "Phi3", SIZES | SPECIAL
        | {"hidden_size": 80, "num_attention_heads": 40, "num_key_value_heads": 10},
    ),
    "dbrx": _causal(
        "Dbrx", {"vocab_size": 64, "d_model": 48, "n_layers": 2, "n_heads": 12, "max_seq_len": 64}
        | DBRX,
    ),
    "llama": _causal("Llama", GROUPED | {"attention_bias": True}),
    "qwen3": _causal("Qwen3", GROUPED),
    "qwen2": _causal("Qwen2", {n: x for n, x in GROUPED.items() if n != "head_dim"}),
    # Eager, because transformers 5.17 leaves the softcap out under sdpa.
    "gemma2": _causal(
        "Gemma2", GROUPED | ALTERNATING
        | {"attn_logit_softcapping": 5.0, "attn_implementation": "eager"},
    ),
    "gemma": _causal("Gemma", GROUPED),
    "mistral": _causal("Mistral", GROUPED | {"sliding_window": 5}),
}  # fmt: skip


def _bloom_in_float64(lines: Callable[[Any], Any]) -> tuple[Any, str, Any]:
    """What to patch of Bloom: releases after 5.17 have its slopes in a function of their own."""
    slopes = getattr(modeling_bloom, "_get_alibi_slopes", None)
    if slopes is None:
        build = modeling_bloom.build_alibi_tensor
        return modeling_bloom, "build_alibi_tensor", lines(build)
    return modeling_bloom, "_get_alibi_slopes", lambda *given: slopes(*given).double()


@contextmanager
def exactly() -> Iterator[None]:
    """Models of float64 go without their steps in float32 and bfloat16, so that they can judge to 1e-11."""
    softmax, to, as_float = F.softmax, torch.Tensor.to, torch.Tensor.float
    product = torch.Tensor.__matmul__

    def wide_softmax(x: Tensor, dim: int, dtype: Any = None, **rest: Any) -> Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype, **rest)

    def wide_product(x: Tensor, y: Tensor) -> Tensor:
        """Of frequencies that stayed float64 and positions that did not, in transformers 5.17."""
        is_wide = torch.float64 in (x.dtype, y.dtype)
        return product(x.double(), y.double()) if is_wide else product(x, y)

    def stays(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        same = x.dtype == torch.float64 and args == (torch.float32,)
        return x if same else to(x, *args, **kwargs)

    def lines(build: Any) -> Any:
        def line(seen: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
            alibi = build(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float64)
            places = ((seen.cumsum(-1) - 1) * seen)[:, None, :]
            alibi = (alibi[:, 0, 1] - alibi[:, 0, 0])[:, None] * places
            return alibi.reshape(-1, 1, seen.shape[1]).to(dtype)

        return line

    mpt = modeling_mpt.build_mpt_alibi_tensor

    def mpt_line(num_heads: int, length: int, bias: int = 8, device: Any = None) -> Tensor:
        step = mpt(num_heads, 2, bias, device).double()
        return torch.arange(1 - length, 1) * (step[..., 1:] - step[..., :1])

    with (
        patch.object(F, "softmax", wide_softmax),
        patch.object(torch.Tensor, "to", stays),
        patch.object(torch.Tensor, "__matmul__", wide_product),
        patch.object(
            torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else as_float(x)
        ),
        patch.object(modeling_mpt, "build_mpt_alibi_tensor", mpt_line),
        patch.object(*_bloom_in_float64(lines)),
        patch.object(
            modeling_falcon, "build_alibi_tensor", lines(modeling_falcon.build_alibi_tensor)
        ),
    ):
        yield


def replaced_step(
    group: seqpar.Group,
    model: Any,
    batch: Mapping[str, Any],
    tp: int,
    strategy: str = "ring",
    **options: Any,
) -> Step:
    """The step of a copy of the model on this rank of a tp x sp grid, with gradients of whole weights."""
    names = [name for name, _ in model.named_parameters()]
    model = copy.deepcopy(model)
    grid = group.grid(ulysses=tp)
    replaced = replace_attention(model, tp=grid.ulysses)
    sp = SequenceParallel(model, attend_by(strategy, grid.ring))
    kept: list[tuple[seqpar.Layout, Tensor]] = []

    def note(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        kept.append((given["seqpar"].plan.layout, output.logits.detach()))

    model.register_forward_hook(note, with_kwargs=True)
    loss = sp.loss(batch, **options)
    loss.backward()
    seqpar.sum_gradients(model.parameters(), grid.ring)
    layout, logits = kept[0]
    logits = seqpar.unshard_sequence(logits, layout, grid.ring)
    return Step(logits, loss.detach(), whole_gradients(model, replaced, names))


def whole_gradients(model: Any, replaced: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """The gradient of every parameter of the model as it was, put together from the ranks of tp."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    whole = replaced.state_dict()
    return {name: whole[name] for name in names}
