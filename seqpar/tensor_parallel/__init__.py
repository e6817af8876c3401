"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from seqpar.tensor_parallel.apply import apply_policy
from seqpar.tensor_parallel.check_layout import check_layout, check_split
from seqpar.tensor_parallel.copies import settle_copies
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.gradient_norm import clip_gradients
from seqpar.tensor_parallel.known_models import known_layout, known_models
from seqpar.tensor_parallel.layer import ParallelAttention
from seqpar.tensor_parallel.policies import contracted, megatron
from seqpar.tensor_parallel.policy import Policy, Rule
from seqpar.tensor_parallel.rotary import Rotary
from seqpar.tensor_parallel.shared_heads import share_heads
from seqpar.tensor_parallel.vocabulary import vocabulary_cross_entropy
from seqpar.tensor_parallel.volume import (
    PolicyVolume,
    Sizes,
    contracted_volume,
    megatron_volume,
    weights_volume,
)
from seqpar.tensor_parallel.whole_model import load_whole_state, whole_state
from seqpar.tensor_parallel.whole_weights import Names

__all__ = [
    "FusedQKV",
    "Names",
    "ParallelAttention",
    "Policy",
    "PolicyVolume",
    "Rotary",
    "Rule",
    "Sizes",
    "apply_policy",
    "check_layout",
    "check_split",
    "clip_gradients",
    "contracted",
    "contracted_volume",
    "known_layout",
    "known_models",
    "load_whole_state",
    "megatron",
    "megatron_volume",
    "settle_copies",
    "share_heads",
    "vocabulary_cross_entropy",
    "weights_volume",
    "whole_state",
]


def __getattr__(name: str) -> Any:
    """Finds the names that moved to the integration with transformers."""
    if name in ("ReplacedModel", "replace_attention"):
        # Found by its name: this package stands below the integrations and imports none of them.
        # docs/design.md: `tensor_parallel` stands above `strategies`
        return getattr(import_module("seqpar.integrations.transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
