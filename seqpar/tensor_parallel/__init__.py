"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from seqpar.tensor_parallel.check_layout import check_layout, check_split
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.known_models import known_layout, known_models

__all__ = ["FusedQKV", "check_layout", "check_split", "known_layout", "known_models"]
