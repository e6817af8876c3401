"""A small Gemma with the ratios of Gemma-7B, its adapters, and its data: the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import GemmaForCausalLM

HEADS = 4
ADAPTED = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
SEED = 0


@dataclass(frozen=True)
class Setting:
    """How large the model and its batches are.

    Args:
        width: of the residual stream, a multiple of 24. The rest follows as in Gemma-7B: all heads together
            are 4/3 as wide, as many for keys and values, the MLP 8, the vocabulary 3 for each layer.
        layers: how many.
        batch, length: of a training step; batch even.
        tokens: generated in one measurement.
        lora_rank: of the adapters, even.
        targets: the projections that have adapters.
    """

    width: int = 192
    layers: int = 4
    batch: int = 4
    length: int = 128
    tokens: int = 100
    lora_rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        counts = (self.layers, self.batch, self.length, self.tokens, self.lora_rank)
        if min(counts) < 1:
            raise ValueError(
                f"layers, batch, length, tokens and lora_rank must be positive, got {counts}"
            )
        if self.batch % 2 or self.lora_rank % 2:
            raise ValueError(
                "batch and lora_rank must be even, to be spread over two ranks, got "
                f"{self.batch} and {self.lora_rank}"
            )
        if self.width < 24 or self.width % 24:
            raise ValueError(f"width must be a positive multiple of 24, got {self.width}")

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.width // 3

    @property
    def hidden(self) -> int:
        """The width of the MLP."""
        return 8 * self.width

    @property
    def vocabulary(self) -> int:
        """The number of tokens there are."""
        return 3 * self.width * self.layers


def gemma_like(setting: Setting, dtype: torch.dtype) -> GemmaForCausalLM:
    """A model with random weights, the embedding tied to the head."""
    from transformers import GemmaConfig, GemmaForCausalLM  # only ranks need it

    config = GemmaConfig(
        hidden_size=setting.width, intermediate_size=setting.hidden, head_dim=setting.head_dim,
        num_hidden_layers=setting.layers, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        vocab_size=setting.vocabulary, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = GemmaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # zeros would hide norms that are cut wrongly
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith(
            "proj.weight"
        ):  # louder than the embedding, which would repeat the last token
            nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
    return model.to(dtype)


def with_adapters(model: GemmaForCausalLM, setting: Setting) -> nn.Module:
    """The model with its weights frozen, and adapters that are not zero."""
    torch.manual_seed(SEED + 1)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=setting.lora_rank, lora_alpha=2 * setting.lora_rank, lora_dropout=0.0,
        target_modules=list(setting.targets), init_lora_weights=False,
    )  # fmt: skip
    return get_peft_model(model, config)


def batch_of(setting: Setting) -> Int[Tensor, "b s"]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(SEED + 2)
    return torch.randint(
        0, setting.vocabulary, (setting.batch, setting.length), generator=generator
    )
