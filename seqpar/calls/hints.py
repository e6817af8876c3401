"""What is allowed and hardly meant: a causal ring out of balance."""

from __future__ import annotations

from seqpar.layout import CAUSAL
from seqpar.strategies.plan import Plan


def idle_share(plan: Plan) -> float:
    """The share of a causal ring's time that zigzag would save, 0 where it is balanced or bits are asked for.

    In every step but the first some rank of a contiguous ring has a full block, and others have none.
    """
    size = plan.group.size
    causal = all(mask.layers == CAUSAL for mask in plan.masks)
    in_order = plan.layout.is_in_order and plan.keys.spans == plan.layout.spans
    if plan.strategy != "ring" or not causal or not in_order or plan.invariant or size == 1:
        return 0.0
    return 1 - (size / 2) / (size - 1 / 2)
