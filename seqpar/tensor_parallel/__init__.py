"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from seqpar.tensor_parallel.apply import apply_policy, whole_state
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.policies import contracted, megatron
from seqpar.tensor_parallel.policy import Policy, Rule

__all__ = [
    "FusedQKV",
    "Policy",
    "Rule",
    "apply_policy",
    "contracted",
    "megatron",
    "whole_state",
]
