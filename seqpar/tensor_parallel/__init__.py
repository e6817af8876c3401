"""Tensor parallelism: weights sharded by heads, fused ones of real models too, beside a sharded sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqpar.tensor_parallel.check_layout import check_layout, check_split
from seqpar.tensor_parallel.fused_qkv import FusedQKV
from seqpar.tensor_parallel.known_models import known_layout, known_models
from seqpar.tensor_parallel.layer import ParallelAttention
from seqpar.tensor_parallel.rotary import Rotary
from seqpar.tensor_parallel.shared_heads import share_heads
from seqpar.tensor_parallel.whole_weights import Names

if TYPE_CHECKING:
    from seqpar.tensor_parallel.replace import ReplacedModel, replace_attention

__all__ = [
    "FusedQKV",
    "Names",
    "ParallelAttention",
    "ReplacedModel",
    "Rotary",
    "check_layout",
    "check_split",
    "known_layout",
    "known_models",
    "replace_attention",
    "share_heads",
]


def __getattr__(name: str) -> object:
    """What needs transformers, imported when it is asked for."""
    if name in ("ReplacedModel", "replace_attention"):
        from seqpar.tensor_parallel import replace

        return getattr(replace, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
