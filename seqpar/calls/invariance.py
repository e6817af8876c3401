"""Invariant bits: when results are the same for any number of ranks, and what is refused for it.

Sums of floats depend on their order, so the order must follow from positions and heads alone. Which
strategy keeps it, and at what cost, is in docs/numerics.md.
"""

from __future__ import annotations

from seqpar.strategies.plan import Plan
from seqpar.strategies.registry import STRATEGIES
from seqpar.strategies.strategy import Order
from seqpar_kernels import Implementation, Request, choose, preference, refusal

# These implementations walk tiles in a fixed order, whatever blocks the tiles come in.
TILED: tuple[Implementation, ...] = ("reference", "triton")


def is_invariant(plan: Plan, request: Request) -> bool:
    """Whether the bits of a plan are to be invariant: as it says, or where they are without being asked."""
    if plan.invariant is not None:
        return plan.invariant
    order = STRATEGIES[plan.strategy].order
    # docs/design.md: invariant bits
    if order is None or not order.by_default or request.device.type == "cuda":
        return False
    return plan.implementation is None or plan.implementation in _able(order, request)


def invariant_implementation(plan: Plan, request: Request) -> Implementation:
    """The implementation of a plan whose bits must be invariant.

    Raises:
        ValueError: the strategy cannot give such bits, at all or with this layout and mask.
        NotImplementedError: the requested one does not keep the order of additions.
    """
    order = _order(plan)
    able = _able(order, request)
    if plan.implementation is None:
        fast = (name for name in preference(request) if refusal(name, request) is None)
        # The reference serves every request in a fixed order, so there always is one.
        return next(name for name in fast if name in able)
    name = choose(request, plan.implementation)
    if name not in able:
        raise NotImplementedError(
            f"implementation {name!r} adds in an order that depends on how the sequence is cut; "
            f"with invariant=True take 'reference' or 'triton'"
        )
    return name


def check_cuts(plan: Plan, border: int | None) -> None:
    """Returns if shards are cut where the order of additions does not notice.

    For plans that have an `invariant_implementation`.

    Args:
        border: of the implementation's tiles, `None` where sequences cannot be cut.

    Raises:
        ValueError: they are not; the message says where to cut.
    """
    order = STRATEGIES[plan.strategy].order
    assert order is not None, "plans without are refused where the implementation is chosen"
    if not order.cuts_sequences:
        return
    for layout in (plan.layout, plan.keys):
        if border is None or not layout.is_cut_at(border):
            raise ValueError(
                f"for the same bits with any number of ranks shards must be cut at tile borders; make "
                f"the layout with multiple_of={border}, got {layout}"
            )


def _order(plan: Plan) -> Order:
    order = STRATEGIES[plan.strategy].order
    if order is None:
        able = tuple(name for name, strategy in STRATEGIES.items() if strategy.order is not None)
        raise ValueError(
            f"strategy {plan.strategy!r} cannot give the same bits for any number of ranks; {able} can"
        )
    reason = order.refusal(plan) or _of_layers(plan, order)
    if reason is not None:
        raise ValueError(reason)
    return order


def _able(order: Order, request: Request) -> set[Implementation]:
    """The implementations that keep the order."""
    able = {name for name in TILED if refusal(name, request) is None}
    if not order.cuts_sequences and request.device.type == "cpu":
        able.add("aten")  # a head is computed whole, and the op's bits do not depend on the others
    return able


def _of_layers(plan: Plan, order: Order) -> str | None:
    """Says why a mask of several layers has no such bits where a row's keys are met in parts."""
    layers = max(len(mask.layers) for mask in plan.masks)
    if layers <= 1 or not order.cuts_sequences:
        return None
    return (
        f"{plan.strategy!r} gives the same bits for any number of ranks only with a mask of one layer, got "
        f"{layers}: rows attend to one after another; 'ulysses' takes any mask"
    )
