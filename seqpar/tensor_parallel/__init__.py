"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from seqpar.tensor_parallel.check_layout import check_layout, check_split
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.known_models import known_layout, known_models
from seqpar.tensor_parallel.layer import ParallelAttention
from seqpar.tensor_parallel.rotary import Rotary
from seqpar.tensor_parallel.shared_heads import share_heads
from seqpar.tensor_parallel.whole_weights import Names

__all__ = [
    "FusedQKV",
    "Names",
    "ParallelAttention",
    "Rotary",
    "check_layout",
    "check_split",
    "known_layout",
    "known_models",
    "share_heads",
]
