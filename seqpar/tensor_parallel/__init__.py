"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from seqpar.tensor_parallel.fused_qkv import FusedQKV

__all__ = ["FusedQKV"]
