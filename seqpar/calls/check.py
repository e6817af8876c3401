"""Every rank checks here what a call must fulfil, and all agree on it before the first collective."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from seqpar.calls.announce import announce, is_heard
from seqpar.calls.invariance import check_cuts, invariant_implementation, is_invariant
from seqpar.calls.options import told_of
from seqpar.calls.shape import Shape
from seqpar.comm import Grid, Group, agreed
from seqpar.layout import Layout, Mask, check_mark, check_rows, check_size
from seqpar.strategies.plan import Agree, Plan
from seqpar.strategies.registry import STRATEGIES
from seqpar.version import VERSION
from seqpar_kernels import (
    FAR,
    TENSORS,
    Dropout,
    Implementation,
    Request,
    Score,
    choose,
    tile_border,
)
from seqpar_kernels.choice import flash_of
from seqpar_kernels.derivatives import has_tangent
from seqpar_kernels.integers import is_integer
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
        _check_capture(q.device, plan)  # here nothing can be compared either
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
    _check_capture(q.device, plan)
    for name, x, layout in (("q", q, plan.layout), ("k", k, plan.keys), ("v", v, plan.keys)):
        check_mark(x, layout, name)
    _check_heads(q, plan.score)
    _check_tangents({"q": q, "k": k, "v": v, **plan.score.tensors})
    return resolved


def _checked(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, with_lse: bool) -> Plan:
    """The plan with its implementation chosen, if plan and shapes are legal."""
    _check_plan(plan)
    _check_tensors(q, k, v)
    _check_rows(q, k, v, plan)
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
    positions = any(term.needs_positions for term in score.terms)
    mask = plan.mask.aligned(plan.layout.length, plan.keys.length, positions=positions)
    # docs/design.md: lse is differentiated where it is asked for
    request = Request.of(
        q, v, (*score.terms, *plan.terms), lse=with_lse,
        length=_attended(plan), windowed=_is_windowed(mask),
    )  # fmt: skip
    asked = request, plan.strategy, plan.implementation, plan.invariant
    name, invariant = plan.kept("implementation", lambda: _decided(plan, request, q, v), *asked)
    # docs/design.md: `choice.py` alone decides
    return replace(plan, implementation=name, invariant=invariant, score=score, mask=mask)


def _is_windowed(mask: Mask) -> bool:
    """Whether a lower diagonal may hide keys."""
    return mask.shift != (0, 0) or any(layer.lower > -FAR for layer in mask.layers)


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


def _check_plan(plan: Plan) -> None:
    for name, kind in (("layout", Layout), ("keys", Layout), ("mask", Mask), ("score", Score)):
        value = getattr(plan, name)
        if not isinstance(value, kind):
            name = name.replace("keys", "kv_layout")
            raise TypeError(f"{name} must be a seqpar.{kind.__name__}, got {value!r}")
    if plan.dropout is not None and not isinstance(plan.dropout, Dropout):
        raise TypeError(f"dropout must be a seqpar.Dropout or None, got {plan.dropout!r}")
    if plan.invariant is not None and not isinstance(plan.invariant, bool):
        raise TypeError(f"invariant must be a bool or None, got {plan.invariant!r}")
    if plan.strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {tuple(STRATEGIES)}, got {plan.strategy!r}")
    if plan.agree not in get_args(Agree):
        raise ValueError(f"agree must be one of {get_args(Agree)}, got {plan.agree!r}")
    _check_layouts(plan)
    _check_grid(plan)
    _check_counts(plan)


def _check_layouts(plan: Plan) -> None:
    layout, keys, group, documents = plan.layout, plan.keys, plan.group, plan.mask.documents
    for each in (layout, keys):
        check_size(each, group.size)
    # docs/design.md: where rows stand over keys of another length is said
    if len({each.step for each in (layout, keys)} - {None}) > 1:
        raise ValueError(
            "queries and keys must be dealt in the same steps: both striped, or neither; "
            f"got {layout.kind} and {keys.kind}"
        )
    if (
        documents is not None
        and plan.mask.pair is None
        and keys.length != layout.length == documents[-1]
    ):
        raise ValueError(
            "documents are of one sequence, and queries and keys have another length, "
            f"{layout.length} and {keys.length}: give boundaries of both, documents=(of_queries, of_keys)"
        )
    for end, length, what in zip(
        plan.mask.lengths or (),
        (layout.length, keys.length),
        ("sequence does", "keys do"),
        strict=False,
    ):
        if end != length:
            raise ValueError(f"documents must end where the {what}, at {length}, got {end}")


def _check_grid(plan: Plan) -> None:
    # docs/design.md: a strategy says what kind it is
    grid, needs = plan.grid, STRATEGIES[plan.strategy].needs_grid
    if needs and not isinstance(grid, Grid):
        raise TypeError(
            f"strategy {plan.strategy!r} takes a seqpar.Grid, got {grid!r}; make one with "
            "group.grid(ulysses=...)"
        )
    if grid is None:
        return
    if not needs:
        able = tuple(name for name, strategy in STRATEGIES.items() if strategy.needs_grid)
        raise ValueError(f"a grid is for {able}, got one for {plan.strategy!r}")
    ours, theirs = (
        (group.rank, group.transport.global_ranks) for group in (plan.group, grid.group)
    )
    if grid.group is not plan.group and (ours != theirs or plan.group.size != grid.group.size):
        raise ValueError(f"the grid must be of the group of the plan, {plan.group}, got {grid}")
    ranks = sorted(rank for row in grid.members for rank in row)
    if ranks != list(range(plan.group.size)) or len({len(row) for row in grid.members}) > 1:
        raise ValueError(
            f"the degrees of the grid must multiply to the {plan.group.size} ranks, got {grid}"
        )


def _check_counts(plan: Plan) -> None:
    for name, least in (("head_chunks", 1), ("first_head", 0)):
        number = getattr(plan, name)
        if not is_integer(number):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if plan.head_chunks > 1 and not STRATEGIES[plan.strategy].exchanges_heads:
        able = tuple(name for name, strategy in STRATEGIES.items() if strategy.exchanges_heads)
        raise ValueError(
            f"head_chunks is for {able}, which exchange heads; got {plan.head_chunks} for "
            f"{plan.strategy!r}"
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must be 4-D, [b sl h d], got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    for what in ("dtype", "device"):
        if len({getattr(x, what) for x in named.values()}) > 1:
            each = ", ".join(f"{name} {getattr(x, what)}" for name, x in named.items())
            raise ValueError(f"q, k and v must have one {what}, got {each}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must have one batch size, got {shapes}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"k and v must have the same heads, got {shapes}")
    if q.shape[3] != k.shape[3] or 0 in (q.shape[3], v.shape[3]):
        raise ValueError(f"q and k must have one width, and v some width, got {shapes}")
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a positive multiple of kv heads, got {shapes}")


def _check_rows(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    for name, x, layout in (("q", q, plan.layout), ("k", k, plan.keys), ("v", v, plan.keys)):
        got = f"{name} {tuple(x.shape)} as [b sl h d]"
        check_rows(layout, plan.group.rank, x.shape[1], got)


def _check_heads(q: Tensor, score: Score) -> None:
    for name, x in score.tensors.items():
        if x.shape[0] != q.shape[2]:
            raise ValueError(
                f"{name} must have one entry for each of the {q.shape[2]} query heads, "
                f"got {tuple(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_capture(device: torch.device, plan: Plan) -> None:
    if plan.group.size > 1 and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "attention over several ranks is not captured in a CUDA graph: ranks compare each call before "
            "they send, which a replay would leave out. Capture what lies between the calls"
        )


def _check_tangents(named: dict[str, Tensor]) -> None:
    # docs/design.md: second derivatives are right or refused
    for name, x in named.items():
        if has_tangent(x):
            raise NotImplementedError(
                f"attention has no forward-mode derivative, but {name} carries a tangent; go backward"
            )


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
