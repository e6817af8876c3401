"""When results are the same bits for any number of ranks, and what has to be refused for it.

Sums of floats depend on their order, so the order must follow from positions and heads alone. Which
strategy keeps it, and at what cost, is in docs/numerics.md.
"""

from __future__ import annotations

from seqpar.strategies.plan import Plan
from seqpar_kernels import Implementation, Request, choose, preference, refusal

TILED: tuple[Implementation, ...] = (
    "reference",
    "triton",
)  # they walk tiles in a fixed order, whatever blocks those come in
STRATEGIES = ("ulysses", "allgather", "ring")


def invariant_implementation(plan: Plan, request: Request) -> Implementation:
    """The implementation of a plan whose bits must be invariant.

    Raises:
        NotImplementedError: the requested one does not keep the order of additions.
    """
    able = {name for name in TILED if refusal(name, request) is None}
    if plan.strategy == "ulysses" and request.device.type == "cpu":
        able.add("aten")  # a head is computed whole, and the op's bits do not depend on the others
    if plan.implementation is None:
        fast = (name for name in preference(request.device) if refusal(name, request) is None)
        return next(name for name in fast if name in able)
    name = choose(request, plan.implementation)
    if name not in able:
        raise NotImplementedError(
            f"implementation {name!r} adds in an order that depends on how the sequence is cut; "
            f"with invariant=True take 'reference' or 'triton'"
        )
    return name


def check_invariance(plan: Plan, border: int | None) -> None:
    """Returns if this strategy gives the same bits for any number of ranks.

    Args:
        border: of the implementation's tiles, `None` where sequences cannot be cut.

    Raises:
        ValueError: it does not; the message says what does.
    """
    if plan.strategy not in STRATEGIES:
        raise ValueError(
            f"strategy {plan.strategy!r} cannot give the same bits for any number of ranks; "
            f"{STRATEGIES} can"
        )
    if plan.strategy == "ulysses":
        return
    if plan.strategy == "ring" and (
        plan.layout.kind != "contiguous"
        or not plan.mask.causal
        or plan.keys.spans != plan.layout.spans
    ):
        raise ValueError(
            "a ring gives the same bits for any number of ranks only with a causal mask, a contiguous "
            f"layout and keys of the same layout, got causal={plan.mask.causal}, {plan.layout.kind} and "
            f"keys {plan.keys.kind}; 'ulysses' and 'allgather' take any layout"
        )
    for layout in (plan.layout, plan.keys):
        if border is None or not layout.is_cut_at(border):
            raise ValueError(
                f"for the same bits with any number of ranks shards must be cut at tile borders; make "
                f"the layout with multiple_of={border}, got {layout}"
            )
