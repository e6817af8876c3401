"""What is allowed and hardly meant: rows of another layout than the batch's, a causal ring out of balance."""

from __future__ import annotations

import warnings

from seqpar.layout import Layout
from seqpar.strategies.plan import Plan


def warn_of_another_cut(plan: Plan) -> None:
    """Warns once where the last batch of this length was cut in another way than is attended."""
    code = plan.group.cut_of(plan.layout.length)
    if code is None or code == plan.layout.code or code in plan.group.warned:
        return
    cut = Layout.decoded(code)
    if cut.size == plan.layout.size and cut.spans != plan.layout.spans:
        plan.group.warned.add(code)
        warnings.warn(
            f"the last batch of this length was cut as {cut} by shard_batch, and rows are attended as "
            f"{plan.layout}: give the layout that shard_batch returned",
            stacklevel=2,
        )


def idle_share(plan: Plan) -> float:
    """The share of a causal ring's time that zigzag would save, 0 where it is balanced or bits are asked for.

    In every step but the first some rank of a contiguous ring has a full block, and others have none.
    """
    size = plan.group.size
    causal = plan.mask.causal and plan.mask.window is None and plan.mask.documents is None
    in_order = plan.layout.is_in_order and plan.keys.spans == plan.layout.spans
    if plan.strategy != "ring" or not causal or not in_order or plan.invariant or size == 1:
        return 0.0
    return 1 - (size / 2) / (size - 1 / 2)
