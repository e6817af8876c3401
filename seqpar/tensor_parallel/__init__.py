"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from seqpar.tensor_parallel.apply import apply_policy, whole_state
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.policies import contracted, megatron
from seqpar.tensor_parallel.policy import Policy, Rule
from seqpar.tensor_parallel.vocabulary import vocabulary_cross_entropy
from seqpar.tensor_parallel.volume import (
    PolicyVolume,
    Sizes,
    contracted_volume,
    megatron_volume,
)

__all__ = [
    "FusedQKV",
    "Policy",
    "PolicyVolume",
    "Rule",
    "Sizes",
    "apply_policy",
    "contracted",
    "contracted_volume",
    "megatron",
    "megatron_volume",
    "vocabulary_cross_entropy",
    "whole_state",
]
