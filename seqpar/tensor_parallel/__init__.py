"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from seqpar.tensor_parallel.apply import apply_policy, whole_state
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.gradient_norm import clip_gradients
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
)
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
    "clip_gradients",
    "contracted",
    "contracted_volume",
    "megatron",
    "megatron_volume",
    "share_heads",
    "vocabulary_cross_entropy",
    "whole_state",
]
