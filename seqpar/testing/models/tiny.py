"""Families of models, so small that a step takes milliseconds, with weights that make every term count."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from seqpar.data import Labels

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = 5
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NORMS = ("norm.weight",)
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}
GPT |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
DBRX: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 64,
}
DBRX |= {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.6, "rope_theta": 1e4}}
DBRX |= {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1}}
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@dataclass(frozen=True)
class Family:
    """How to make a model of a family.

    Args:
        model, config: names of the classes in transformers.
        options: of the config.
        labels: what a row of it predicts.
        float32: parts of the names of parameters whose gradients the model itself adds in float32.
        since: the first release of transformers that computes its attention through the interface.
    """

    model: str
    config: str
    options: dict[str, Any]
    labels: Labels = "next"
    float32: tuple[str, ...] = ()
    since: tuple[int, int] = (5, 17)

    @property
    def is_served(self) -> bool:
        """Whether the installed transformers computes its attention through the interface."""
        return self.since <= RELEASE

    def make(
        self, dtype: torch.dtype = torch.float64, *, spread: float = 0.2, **changes: Any
    ) -> Any:
        """A model in training mode, the same weights every time.

        Args:
            spread: of what is added to the weights that the model starts with.
            changes: of the config.
        """
        config = getattr(transformers, self.config)(**(self.options | changes))
        # Ranks that are threads share torch's generator.
        with _DRAWING, torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config).to(dtype).train()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * spread)
        return model


_DRAWING = threading.Lock()

FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "mistral": Family("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": WINDOW}),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GROUPED | ALTERNATING | {"attn_logit_softcapping": 5.0},
        float32=NORMS,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | ALTERNATING, float32=NORMS
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        GROUPED
        | ALTERNATING
        | {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        GROUPED
        | {
            # Its experts are weighed in float32, by a sigmoid that is another at the end of a tensor.
            "intermediate_size_mlp": 48, "moe_layers": [], "attention_chunk_size": 4, "floor_scale": 4,
            "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"],
            "pad_token_id": 0,
        },
        float32=NORMS,
    ),
    "bert": Family("BertForMaskedLM", "BertConfig", SIZES | UNDROPPED, "own"),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        SIZES
        | {"local_attention": 2 * WINDOW, "layer_types": ALTERNATING["layer_types"]}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        | {"cls_token_id": 1, "sep_token_id": 2},
        "own",
    ),
}  # fmt: skip

# With attention of another make, which the interface took in one by one.
LATER = {
    "persimmon": Family("PersimmonForCausalLM", "PersimmonConfig", SIZES),
    "dbrx": Family("DbrxForCausalLM", "DbrxConfig", DBRX),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT),
    "gptj": Family("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}, since=(5, 24)),
    "codegen": Family(
        "CodeGenForCausalLM", "CodeGenConfig", GPT | {"rotary_dim": 4}, since=(5, 24)
    ),
}
SERVED = FAMILIES | {name: family for name, family in LATER.items() if family.is_served}


def tokens(batch: int, length: int) -> torch.Tensor:
    """Token ids `[batch, length]`, the same every time, none of them special."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def batch_of(batch: int, length: int) -> dict[str, torch.Tensor]:
    """A batch as its user has it: tokens, and labels of which some do not count."""
    ids = tokens(batch, length)
    labels = ids.clone()
    labels[:, 3 : max(4, length // 4)] = -100
    return {"input_ids": ids, "labels": labels}
