"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.gradient_norm import clip_gradients
from seqpar.tensor_parallel.layer import ParallelAttention
from seqpar.tensor_parallel.rotary import Rotary
from seqpar.tensor_parallel.shared_heads import share_heads
from seqpar.tensor_parallel.whole_weights import Names

__all__ = ["FusedQKV", "Names", "ParallelAttention", "Rotary", "clip_gradients", "share_heads"]
