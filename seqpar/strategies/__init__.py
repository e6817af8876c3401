"""The ways to attend a sharded sequence. Each file holds one; `registry` has all of them by name."""

from seqpar.strategies import dry_run
from seqpar.strategies.check import agree_on_call, check_call, resolve
from seqpar.strategies.materialised import attention_weights
from seqpar.strategies.plan import Plan
from seqpar.strategies.registry import STRATEGIES
from seqpar.strategies.shape import Shape, Volume
from seqpar.strategies.strategy import Order, Strategy

__all__ = [
    "STRATEGIES",
    "Order",
    "Plan",
    "Shape",
    "Strategy",
    "Volume",
    "agree_on_call",
    "attention_weights",
    "check_call",
    "dry_run",
    "resolve",
]
