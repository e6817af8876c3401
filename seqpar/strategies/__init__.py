"""The ways to attend a sharded sequence. Each file holds one strategy and the formula of what it sends."""

from collections.abc import Callable
from typing import Any

from seqpar.strategies.allgather import allgather_attention, allgather_volume
from seqpar.strategies.check import agree_on_call, check_call, resolve
from seqpar.strategies.materialised import (
    attention_weights,
    materialised_attention,
    materialised_volume,
)
from seqpar.strategies.mesh import mesh_attention, mesh_volume
from seqpar.strategies.plan import GRID_STRATEGIES, HEAD_STRATEGIES, STRATEGY_NAMES, Plan, Strategy
from seqpar.strategies.ring import ring_attention, ring_volume
from seqpar.strategies.ulysses import ulysses_attention, ulysses_volume
from seqpar.strategies.volume import Shape, Volume

STRATEGIES: dict[Strategy, Callable[..., Any]] = {
    "ring": ring_attention,
    "ulysses": ulysses_attention,
    "allgather": allgather_attention,
    "mesh": mesh_attention,
    "hybrid": ulysses_attention,
    "materialised_rows": materialised_attention,
    "materialised_columns": materialised_attention,
    "materialised_depth": materialised_attention,
}
VOLUMES: dict[Strategy, Callable[[Plan, int, Shape], Volume]] = {
    "ring": ring_volume,
    "ulysses": ulysses_volume,
    "allgather": allgather_volume,
    "mesh": mesh_volume,
    "hybrid": ulysses_volume,
    "materialised_rows": materialised_volume,
    "materialised_columns": materialised_volume,
    "materialised_depth": materialised_volume,
}

__all__ = [
    "GRID_STRATEGIES",
    "HEAD_STRATEGIES",
    "STRATEGIES",
    "STRATEGY_NAMES",
    "VOLUMES",
    "Plan",
    "Shape",
    "Strategy",
    "Volume",
    "agree_on_call",
    "attention_weights",
    "check_call",
    "resolve",
]
