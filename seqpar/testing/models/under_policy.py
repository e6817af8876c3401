"""A step of a tiny model whose weights a policy has cut, and of the same model on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqpar.tensor_parallel import Policy, apply_policy, vocabulary_cross_entropy, whole_state
from seqpar.tensor_parallel.collectives import Collective, Collectives
from seqpar.testing.models.tiny import Family

VOCABULARY = 48
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 12, "max_position_embeddings": 16,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 6, "head_dim": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"cls_token_id": 1, "sep_token_id": 2}
GPT = {
    "vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 16,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
} | TOKENS  # fmt: skip
SEPARATE = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GROUPED | {"pad_token_id": 5}),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", GROUPED),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
}
# By family, what its attention is called, which holds q, k and v in one weight.
FUSED = {
    "bloom": (
        Family("BloomForCausalLM", "BloomConfig", {
            "vocab_size": VOCABULARY, "hidden_size": 24, "n_layer": 2, "n_head": 4,
            "hidden_dropout": 0.0, "attention_dropout": 0.0}), "self_attention"),
    "gpt_neox": (Family("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES), "attention"),
    "persimmon": (Family("PersimmonForCausalLM", "PersimmonConfig", SIZES), "self_attn"),
    "falcon": (Family("FalconForCausalLM", "FalconConfig", SIZES | {"bias": True}), "self_attention"),
    "gpt_bigcode": (Family("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT), "attn"),
    "mpt": (Family("MptForCausalLM", "MptConfig", {
        "vocab_size": VOCABULARY, "d_model": 24, "n_layers": 2, "n_heads": 4}), "attn"),
    "modernbert": (Family("ModernBertForMaskedLM", "ModernBertConfig", SIZES | TOKENS | BERT), "attn"),
    "gpt2": (Family("GPT2LMHeadModel", "GPT2Config", GPT), "attn"),
    "phi3": (Family("Phi3ForCausalLM", "Phi3Config", SIZES | TOKENS), "self_attn"),
    "dbrx": (
        Family("DbrxForCausalLM", "DbrxConfig", {
            "vocab_size": VOCABULARY, "d_model": 24, "n_layers": 2, "n_heads": 4,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 24, "hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
        }), "attn"),
    "codegen": (Family("CodeGenForCausalLM", "CodeGenConfig", GPT | {"rotary_dim": 4}), "attn"),
}  # fmt: skip


@dataclass(frozen=True)
class CutStep:
    """What a step computed and sent: gradients and weights whole, by name."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    forward: tuple[Collective, ...] = ()
    backward: tuple[Collective, ...] = ()


def tiny(name: str, **changes: Any) -> Any:
    """A model of a family in float64, its norms too; attention that is fused counts as cut already."""
    family, attention = FUSED[name] if name in FUSED else (SEPARATE[name], None)
    model = family.make(**changes)
    for path, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            in_float64(module)
        if attention is not None and path.endswith(f".{attention}"):
            module.is_tensor_parallel = True
    return model


def in_float64(norm: Any) -> None:
    """Takes the casts to float32 out of an RMS norm of transformers."""
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    one = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
    norm.forward = lambda x: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (one + norm.weight)
    )


def tokens(rows: int = 2, length: int = 7, vocabulary: int = VOCABULARY) -> Tensor:
    """The same ones every time, `[b s]`, among them 0 and 5."""
    ids = torch.arange(rows * length).view(rows, length) * 5
    return ids % vocabulary


def whole_step(model: Any, ids: Tensor) -> CutStep:
    """On one device."""
    logits, loss = _loss(model, ids, None)
    loss.backward()
    gradients = {
        name: p.grad
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.grad is not None
    }
    weights = dict(model.named_parameters(remove_duplicate=False))
    return CutStep(logits, loss, gradients, weights)


def cut_step(
    model: Any, ids: Tensor, policy: Policy, mesh: Any, group: Any = None, vocabulary: int = 0
) -> CutStep:
    """On this rank. Logits are this rank's part where they are sharded, which `group` then says."""
    apply_policy(model, policy, mesh)
    with Collectives() as forward:
        logits, loss = _loss(model, ids, group, vocabulary)
    with Collectives() as backward:
        loss.backward()
    gradients = whole_state(model, gradients=True)
    for name, p in model.named_parameters():  # of attention that is no policy's
        if name not in gradients and p.grad is not None:
            gradients[name] = p.grad
    calls = tuple(forward.calls), tuple(backward.calls)
    return CutStep(logits, loss, gradients, whole_state(model), *calls)


def _loss(model: Any, ids: Tensor, group: Any, vocabulary: int = 0) -> tuple[Tensor, Tensor]:
    """The mean over all rows of predicting the next token; the last row predicts nothing."""
    given = {} if "Bert" in type(model).__name__ else {"use_cache": False}
    logits = model(ids, **given).logits
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    if group is None:
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    else:
        each = vocabulary_cross_entropy(logits, labels, group, vocabulary=vocabulary)
    return logits, each.mean()


def farthest(got: CutStep, want: CutStep) -> dict[str, float]:
    """The largest differences of loss and gradients, and of weights.

    Raises:
        AssertionError: they have other names.
    """
    assert got.gradients.keys() == want.gradients.keys(), (
        got.gradients.keys() ^ want.gradients.keys()
    )
    worst: Callable[[Tensor, Tensor], float] = lambda x, y: float((x - y).detach().abs().max())  # noqa: E731
    return {
        "loss": worst(got.loss, want.loss),
        "gradients": max(worst(x, want.gradients[n]) for n, x in got.gradients.items()),
        "weights": max(worst(x, want.weights[n]) for n, x in got.weights.items()),
    }


def sent(calls: Iterable[Collective]) -> dict[str, Fraction]:
    """Elements that a rank sends, by kind."""
    total: dict[str, Fraction] = {}
    for call in calls:
        total[call.kind] = total.get(call.kind, Fraction(0)) + call.sent
    return total


def parameters_of(model: nn.Module) -> dict[str, tuple[type, tuple[int, ...]]]:
    """What kind and shape every parameter has."""
    return {name: (type(p), tuple(p.shape)) for name, p in model.named_parameters()}
