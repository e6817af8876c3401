"""The ways to attend a sharded sequence. Each file holds one strategy and the formula of what it sends."""

from seqpar.strategies.check import agree_on_call
from seqpar.strategies.plan import STRATEGY_NAMES, Plan, Strategy
from seqpar.strategies.ring import ring_attention, ring_volume
from seqpar.strategies.ulysses import ulysses_attention, ulysses_volume
from seqpar.strategies.volume import Shape, Volume

STRATEGIES = {"ring": ring_attention, "ulysses": ulysses_attention}
VOLUMES = {"ring": ring_volume, "ulysses": ulysses_volume}

__all__ = [
    "STRATEGIES",
    "STRATEGY_NAMES",
    "VOLUMES",
    "Plan",
    "Shape",
    "Strategy",
    "Volume",
    "agree_on_call",
    "ring_attention",
    "ring_volume",
    "ulysses_attention",
    "ulysses_volume",
]
