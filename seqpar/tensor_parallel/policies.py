"""The policies that are built in: `megatron` and `contracted`, for models of transformers by their type."""

from __future__ import annotations

from typing import Literal

from torch import nn

from seqpar.tensor_parallel.cut import Form
from seqpar.tensor_parallel.policy import Policy, Rule, weight_paths

# Models whose q, k, v, gate and up are separate, and whose norms are RMS norms.
SEPARATE = frozenset(
    {"llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"}
)  # fmt: skip
# Models whose q, k and v are one weight: their attention is replaced before a policy is applied.
FUSED = frozenset(
    {
        "bloom", "codegen", "dbrx", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "modernbert", "mpt",
        "persimmon", "phi3",
    }
)  # fmt: skip

_ANY = r"(?:.*\.)?"
_END = r"\.(?:weight|bias)"
_BASE = r"(?:\.base_layer)?" + _END
_A, _B = r"\.lora_A\.\w+\.weight", r"\.lora_B\.\w+\.weight"
_QKV = _ANY + r"self_attn\.[qkv]_proj"
_OUT = _ANY + r"self_attn\.o_proj"
_GATE_UP = _ANY + r"mlp\.(?:gate|up)_proj"
_DOWN = _ANY + r"mlp\.down_proj"
_EMBEDDING = _ANY + r"(?:embed_tokens|word_embeddings|wte|embed_in|tok_embeddings)\.weight"
_HEAD = _ANY + r"(?:lm_head|decoder)" + _END
_HEAD_NORMS = _ANY + r"self_attn\.[qk]_norm\.weight"
_NORMS = (
    _ANY + r"(?!q_norm|k_norm)(?:\w*norm|norm_\w+|ln_\w+)" + _END
)  # fmt: skip


def megatron(model: nn.Module, *, logits: Form = "whole") -> Policy:
    """Projections into a block by output, those out of it by input: an all-reduce for each block.

    q, k, v, gate and up are cut by output, o and down by input, the embedding and the head by vocabulary; the
    rest is on every rank, and so are the activations between blocks. LoRA's A and B are cut with their layer.

    Args:
        logits: "whole" gathers the logits on every rank; "sharded" leaves each its part of the vocabulary,
            for `vocabulary_cross_entropy`.

    Raises:
        NotImplementedError: the model is of no known type.

    Source: Shoeybi et al. 2019, Megatron-LM (arXiv:1909.08053), section 3.
    """
    _known(model, "megatron", SEPARATE | FUSED)
    fc1 = _ANY + r"(?:mlp\.(?:dense_h_to_4h|c_fc|fc_in)|ffn\.up_proj)"
    fc2 = _ANY + r"(?:mlp\.(?:dense_4h_to_h|c_proj|fc_out|Wo)|ffn\.down_proj)"
    pair = _ANY + r"mlp\.(?:gate_up_proj|Wi)"
    into, out = (rf"(?:{_QKV}|{_GATE_UP}|{fc1})"), rf"(?:{_OUT}|{_DOWN}|{fc2})"
    rules = (
        Rule(_QKV + _BASE, "output", "whole", "sharded", unit="head_dim"),
        Rule(rf"(?:{_GATE_UP}|{fc1})" + _BASE, "output", "whole", "sharded"),
        Rule(pair + _BASE, "paired output", "whole", "sharded"),
        Rule(out + _BASE, "input", "sharded", "whole"),
        Rule(into + _A, "replicate"),
        Rule(into + _B, "output", "whole", "sharded"),
        Rule(out + _A, "input", "sharded", "whole"),
        Rule(out + _B, "replicate"),
        Rule(_EMBEDDING, "vocabulary", "whole", "whole"),
        Rule(_HEAD, "vocabulary", "whole", logits),
        Rule(_HEAD_NORMS, "each head"),
        Rule(_NORMS, "replicate"),
        Rule(_ANY + r"wpe\.weight", "replicate"),
        Rule(_ANY + r"ffn\.(?:router|experts)\..*", "replicate"),
        Rule(r"head\.dense" + _END, "replicate"),
        Rule(
            _ANY
            + r"(?:self_attention|attention|self_attn|attn)\."
            + r"(?:query_key_value|qkv_proj|c_attn|Wqkv|dense|c_proj|out_proj|Wo|[qk]_(?:layernorm|ln))"
            + _END,
            "fused heads",
        ),
    )
    return _only_used("megatron", rules, model)


def contracted(model: nn.Module, *, logits: Form = "whole") -> Policy:
    """The axes the other way round: q, k, v, gate and up by input, o and down by output.

    Activations between blocks are sharded along the model width, and norms over it add up one number a
    row; inside of a block they are whole on every rank, after an all-reduce of each projection. The numbers
    are those of `megatron`, and the volume is ten times its own forward for shapes such as Gemma-7B's: it is
    here to be compared with.

    Args:
        logits: "whole" on every rank, or "sharded" by vocabulary.

    Raises:
        NotImplementedError: the model is of no type that it serves.
    """
    _known(model, "contracted", SEPARATE)
    rules = (
        Rule(rf"(?:{_QKV}|{_GATE_UP})" + _BASE, "input", "sharded", "whole"),
        Rule(rf"(?:{_OUT}|{_DOWN})" + _BASE, "output", "whole", "sharded"),
        Rule(rf"(?:{_QKV}|{_GATE_UP})" + _A, "input", "sharded", "whole"),
        Rule(rf"(?:{_QKV}|{_GATE_UP})" + _B, "replicate"),
        Rule(rf"(?:{_OUT}|{_DOWN})" + _A, "replicate"),
        Rule(rf"(?:{_OUT}|{_DOWN})" + _B, "output", "whole", "sharded"),
        Rule(_EMBEDDING, "width", "whole", "sharded"),
        Rule(_HEAD, "input", "sharded", logits),
        Rule(_HEAD_NORMS, "replicate"),
        Rule(_NORMS, "width", "sharded", "sharded"),
    )
    return _only_used("contracted", rules, model)


def _known(
    model: nn.Module, name: Literal["megatron", "contracted"], types: frozenset[str]
) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in types:
        raise NotImplementedError(
            f"{name} serves models of types {', '.join(sorted(types))}, got {type(model).__name__} of type "
            f"{kind!r}; write a seqpar.tensor_parallel.Policy with a rule for each of its weights"
        )


def _only_used(name: str, rules: tuple[Rule, ...], model: nn.Module) -> Policy:
    paths = list(weight_paths(model))
    return Policy(name, tuple(r for r in rules if any(map(r.matches, paths))))
