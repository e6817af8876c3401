"""`Recipe`: what a run does. What its losses depend on is kept apart from how ranks get there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import seqpar
from seqpar.layout import LAYOUTS

ATTENTIONS = {
    "ring": seqpar.RingAttention,
    "ulysses": seqpar.UlyssesAttention,
    "allgather": seqpar.AllGatherAttention,
    "mesh": seqpar.MeshAttention,
    "hybrid": seqpar.HybridAttention,
}
GRIDS = ("mesh", "hybrid")  # strategies that take a seqpar.Grid
CHECKPOINTINGS = ("none", "full", "keep-attention")


def _option(default: Any, meaning: str, choices: Iterable[str] = (), least: float = 1) -> Any:
    metadata = {"help": meaning, "choices": tuple(choices) or None, "least": least}
    return field(default=default, metadata=metadata | {"is_free": False})


def _free(default: Any, meaning: str, choices: Iterable[str] = (), least: float = 1) -> Any:
    """An option that a resumed run may change: losses are the same whatever it is."""
    return field(
        default=default,
        metadata=_option(default, meaning, choices, least).metadata | {"is_free": True},
    )


@dataclass(frozen=True)
class Recipe:
    """Everything about a run but its ranks and its text.

    Raises:
        ValueError: a value is out of range, or values do not fit together.
    """

    strategy: str = _free("ring", "how ranks share attention", ATTENTIONS)
    layout: str = _free("zigzag", "which rank holds which positions", LAYOUTS)
    dp: int = _free(1, "replicas, each with its own sequences; the other ranks share those")
    ulysses: int = _free(
        0, "of mesh and hybrid: ranks of a row; 0 takes the divisor nearest to the root", least=0
    )
    accumulate: int = _free(1, "micro-batches of a step")
    checkpointing: str = _free("none", "what blocks recompute in backward", CHECKPOINTINGS)
    loss_tile: int = _free(0, "rows whose logits exist at once; 0: all", least=0)
    mlp_tile: int = _free(0, "rows of a sequence that an MLP computes at once; 0: all", least=0)
    saved_on: str = _free("device", "where what blocks save for backward waits", ("device", "host"))
    dtype: str = _option("float32", "of parameters and activations", ("float32", "float64"))
    autocast: str = _option("none", "type of products in forward", ("none", "bfloat16"))
    steps: int = _free(50, "in all, those before --resume included")
    length: int = _option(1024, "bytes of a sequence", least=2)
    batch: int = _option(2, "sequences of a step")
    dim: int = _option(128, "model width")
    layers: int = _option(2, "number of blocks")
    heads: int = _option(4, "query heads")
    kv_heads: int = _option(2, "key/value heads, of which heads is a multiple")
    lr: float = _option(1e-3, "learning rate after the warmup, constant from there", least=0)
    warmup: int = _option(10, "steps until then, linear", least=0)
    clip: float = _option(0.0, "largest norm of the gradient; 0: any", least=0)
    eps: float = _option(
        1e-6, "of AdamW; the smaller, the more rounding of small gradients shows", least=0
    )
    seed: int = _option(0, "of parameters and batches", least=0)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {choices}, got {value!r}")
            if not choices and not (least := f.metadata["least"]) <= value < math.inf:
                raise ValueError(f"{f.name} must be finite and at least {least}, got {value}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim={self.dim} must be a multiple of 2 * heads={2 * self.heads}")
        if self.batch % (self.dp * self.accumulate):
            raise ValueError(
                f"batch={self.batch} must be a multiple of dp * accumulate={self.dp} * {self.accumulate}"
            )
        if self.ulysses and self.strategy not in GRIDS:
            raise ValueError(f"ulysses={self.ulysses} is for {GRIDS}, got {self.strategy!r}")

    @property
    def fixed(self) -> dict[str, Any]:
        """What losses depend on, by name: a resumed run must have the same."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.metadata["is_free"]}
