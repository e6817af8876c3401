"""The ways to attend a sharded sequence. Each file holds one; `registry` has all of them by name."""

from seqpar.strategies.materialised import attention_weights
from seqpar.strategies.plan import Plan
from seqpar.strategies.registry import STRATEGIES
from seqpar.strategies.strategy import Order, Strategy

__all__ = [
    "STRATEGIES",
    "Order",
    "Plan",
    "Strategy",
    "attention_weights",
]
