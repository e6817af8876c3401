"""Every rank checks here what a call must fulfil, and all agree on it before the first collective."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqpar.calls.announce import announce, is_heard
from seqpar.calls.check_plan import check_plan
from seqpar.calls.check_tensors import (
    check_capture,
    check_modifiers,
    check_score,
    check_shapes,
    check_tangents,
    check_tensors,
)
from seqpar.calls.invariance import check_cuts, invariant_implementation, is_invariant
from seqpar.calls.options import told_of
from seqpar.calls.shape import Shape
from seqpar.comm import Group, agreed
from seqpar.layout import check_mark
from seqpar.layout.together import aligned_together
from seqpar.strategies.plan import Plan
from seqpar.strategies.registry import STRATEGIES
from seqpar.version import VERSION
from seqpar_kernels import (
    TENSORS,
    Implementation,
    Request,
    choose,
    tile_border,
)
from seqpar_kernels.choice import flash_of
from seqpar_kernels.watching import watcher


def agree_on_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    with_lse: bool = False,
    learning: tuple[bool, ...] | None = None,
    operation: str = "attention",
) -> Plan:
    """Gives the plan with its implementation chosen, if the call is legal and the same on all ranks.

    All ranks must call.

    Args:
        with_lse: whether lse is wanted too, and differentiable.
        learning: which of q, k, v and the score's tensors want gradients; by default those that say so.
        operation: what is done with the plan, the same on all ranks.

    Raises:
        TypeError: an argument is of the wrong kind, or a tensor not floating point.
        ValueError: shapes, devices, heads or rows do not fit together or do not fit the layout, or the
            strategy cannot give invariant bits with this layout and mask.
        NotImplementedError: no implementation serves this device and dtype, or not the requested one.
        DesyncError: ranks differ, or another rank raised one of the above.
    """
    # Without a group there is nobody to agree with, so this alone may be refused on one rank.
    if not isinstance(plan, Plan) or not isinstance(plan.group, Group):
        raise TypeError(f"attention takes a seqpar.Plan with a seqpar.Group, got {plan!r}")
    if plan.group.size == 1:
        return check_call(q, k, v, plan, with_lse=with_lse)
    if isinstance(q, Tensor) and plan.group.transport.control_device.type == "cuda":
        check_capture(q.device, plan)  # here nothing can be compared either
    known = plan.group.calls.trusted
    if plan.agree == "plan" and known:  # the first call of all is compared, whatever it is
        resolved = check_call(q, k, v, plan, with_lse=with_lse)
        if _kind(operation, _claim(q, k, v, resolved, with_lse, learning)) in known:
            return resolved
    # docs/design.md: agreement on every call
    with agreed(plan.group, operation=operation) as claim:
        resolved = check_call(q, k, v, plan, with_lse=with_lse)
        asked = _claim(q, k, v, resolved, with_lse, learning)
        claim |= asked
        if operation == "attention" and is_heard(plan.group):
            learns = tuple(name for name in TENSORS if claim[f"{name} learn"])
            announce(resolved, Shape.of(q, k, v, with_lse=with_lse, learns=learns), q.device)
    # Only after agreement, because all ranks must come here and one that refused does not.
    plan.group.transport.prepare(q.device)
    if plan.agree == "plan":
        known.add(_kind(operation, asked))
    return resolved


def check_call(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, with_lse: bool = False) -> Plan:
    """Gives the plan with its implementation chosen, if the call is legal on this rank. Sends nothing.

    Raises:
        TypeError, ValueError, NotImplementedError: as `agree_on_call`.
    """
    if type(q) is type(k) is type(v) is Tensor:
        kind = tuple((x.shape, x.dtype, x.device) for x in (q, k, v))
        mode = (
            with_lse,
            torch.are_deterministic_algorithms_enabled(),
            watcher() is None,
            flash_of(q),
        )
        resolved = plan.own.get((*kind, *mode), lambda: _checked(q, k, v, plan, with_lse=with_lse))
    else:  # of a subclass, such as what compilers trace with, sizes may be symbols
        resolved = _checked(q, k, v, plan, with_lse=with_lse)
    # These may be others in every call.
    plan.group.transport.check_device(q.device)
    check_capture(q.device, plan)
    for name, x, layout in (("q", q, plan.layout), ("k", k, plan.keys), ("v", v, plan.keys)):
        check_mark(x, layout, name)
    check_score(q, resolved, invariant=plan.invariant)
    check_modifiers(q, resolved)
    check_tangents({"q": q, "k": k, "v": v, **plan.score.tensors})
    return resolved


def _checked(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, with_lse: bool) -> Plan:
    """The plan with its implementation chosen, if plan and shapes are legal."""
    check_plan(plan)
    check_tensors(q, k, v)
    check_shapes(q, k, v, plan)
    return resolve(plan, q, v, with_lse=with_lse)


def resolve(plan: Plan, q: Tensor, v: Tensor, *, with_lse: bool = False) -> Plan:
    """Decides all that a plan leaves open for these tensors: implementation, invariance, scale, alignment.

    Sends nothing.

    Raises:
        ValueError: bits cannot be invariant with this strategy, layout and mask, or the mask does not say
            where rows stand over another number of keys.
        NotImplementedError: no implementation serves them, or not the requested one.
    """
    score = plan.score.resolve(q.shape[3])
    positions = any(term.compares_positions for term in score.terms)
    lengths = plan.layout.length, plan.keys.length
    masks = aligned_together(plan.given_masks, *lengths, positions=positions)
    mask = masks if isinstance(plan.mask, tuple) else masks[0]
    # docs/design.md: lse is differentiated where it is asked for
    request = Request.of(
        q, v, (*score.terms, *plan.terms), lse=with_lse,
        length=_attended(plan), windowed=any(mask.is_windowed for mask in masks),
    )  # fmt: skip
    asked = request, plan.strategy, plan.implementation, plan.invariant
    name, invariant = plan.kept("implementation", lambda: _decided(plan, request, q, v), *asked)
    # docs/design.md: `choice.py` alone decides
    return replace(plan, implementation=name, invariant=invariant, score=score, mask=mask)


def _attended(plan: Plan) -> int:
    """How many tokens a rank attends at once, the same on all ranks: by that an implementation is chosen."""
    rows = max(plan.layout.rows, default=0)
    if not STRATEGIES[plan.strategy].exchanges_heads:
        return rows
    ranks = plan.group.size if plan.grid is None else plan.grid.shape[1]
    return min(rows * ranks, plan.layout.length)


def _decided(
    plan: Plan, request: Request, q: Tensor, v: Tensor
) -> tuple[Implementation | None, bool]:
    """(implementation, whether bits are invariant), as `resolve` decides them."""
    if is_invariant(plan, request):
        name = invariant_implementation(plan, request)
        check_cuts(plan, tile_border(name, q, v))
        return name, True
    if not STRATEGIES[plan.strategy].stores_scores:
        return choose(request, plan.implementation), False
    if plan.implementation not in (None, "reference", "triton"):
        raise NotImplementedError(
            f"stored scores are made by torch and softened by torch or Triton, got implementation "
            f"{plan.implementation!r}; 'reference', 'triton' or None can do it"
        )
    # Only to refuse: without a name, torch or Triton makes the softmax, as the device has it.
    choose(request, plan.implementation)
    return plan.implementation, False


def _kind(operation: str, claim: dict[str, Any]) -> str:
    """A hash of all that a plan is trusted for: the seed of dropout is another in every step."""
    drop = claim["dropout"]
    same = claim if drop is None else claim | {"dropout": drop.p}
    return hashlib.blake2b(repr((operation, same)).encode(), digest_size=16).hexdigest()


def _claim(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, with_lse: bool, learning: tuple[bool, ...] | None
) -> dict[str, Any]:
    """The claim of a call: all that ranks must have in common, of a resolved plan."""
    learned = [plan.score.tensors.get(name) for name in TENSORS]
    if learning is None:
        wants = (x is not None and x.requires_grad for x in (q, k, v, *learned))
        learning = tuple(w and torch.is_grad_enabled() for w in wants)
    return {
        "version": VERSION,
        **told_of(plan),
        "with lse": with_lse,
        "batch": q.shape[0],
        "heads (hq, hkv)": (q.shape[2], k.shape[2]),
        "widths (d, vd)": (q.shape[3], v.shape[3]),
        "dtype": q.dtype,
        "device": q.device.type,
        "under torch's flash op": flash_of(q),
        # Backward sends the same for any of q, k and v, so which of them it is for need not agree.
        "requires_grad": any(learning[:3]),
        **{f"{name} learn": there for name, there in zip(TENSORS, learning[3:], strict=True)},
    }
