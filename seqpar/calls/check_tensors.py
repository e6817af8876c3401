"""Whether tensors fit a call, and each other."""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.layout import check_local, check_rows
from seqpar.strategies.plan import Plan
from seqpar_kernels import TABLES, TENSORS, Score, accumulation_dtype
from seqpar_kernels.derivatives import has_tangent
from seqpar_kernels.terms.modifiers import captured, check_modifier
from seqpar_kernels.terms.table import check_finite


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises where no plan could take these."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        check_local(x, name)
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


def check_shapes(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    """Raises where a plan is for other rows, or another batch."""
    for name, x, layout in (("q", q, plan.layout), ("k", k, plan.keys), ("v", v, plan.keys)):
        got = f"{name} {tuple(x.shape)} as [b sl h d]"
        check_rows(layout, plan.group.rank, x.shape[1], got)
    if isinstance(plan.mask, tuple) and len(plan.mask) != q.shape[0]:
        raise ValueError(
            f"there must be a mask for each of the {q.shape[0]} batch entries, got {len(plan.mask)}"
        )


def check_score(q: Tensor, plan: Plan, *, invariant: bool | None) -> None:
    """Raises where the tensors of a score are of another size, or elsewhere.

    Args:
        plan: resolved.
        invariant: as the caller said it.
    """
    score, lengths = plan.score, (plan.layout.length, plan.keys.length)
    check_tensors_of(score, q, lengths)
    if score.bias is not None and plan.masks[0].shift != (0, 0):
        raise NotImplementedError(
            "a bias counts rows and keys from 0, and this mask has rows stand elsewhere: say it with "
            "align='top-left'"
        )
    learns = any(x.requires_grad for name, x in score.tensors.items() if name in TABLES)
    if invariant is True and (learns or score.captured) and torch.is_grad_enabled():
        raise NotImplementedError(
            "gradients of biases and of what a score_mod holds are sums over scores, whose order depends on "
            "the number of ranks; take invariant=None, or tensors that do not learn"
        )


def check_tensors_of(score: Score, q: Tensor, lengths: tuple[int, int]) -> None:
    """Raises where the tensors of a score are not for these queries, or elsewhere.

    Args:
        lengths: of queries and keys.
    """
    for term in score.terms:
        if term.name not in TENSORS:
            continue
        if term.value.device != q.device:
            raise ValueError(
                f"{term.name} must be on the device of q, {q.device}, got {term.value.device}"
            )
        term.check_fits(q.shape, lengths)
        if term.has_sums:
            check_finite(term.name, term.value, accumulation_dtype(q.dtype))


def check_capture(device: torch.device, plan: Plan) -> None:
    """Raises where a CUDA graph is made of a call that sends."""
    if plan.group.size > 1 and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "attention over several ranks is not captured in a CUDA graph: ranks compare each call before "
            "they send, which a replay would leave out. Capture what lies between the calls"
        )


def check_tangents(named: dict[str, Tensor]) -> None:
    """Raises where a tensor has a forward-mode derivative."""
    # docs/design.md: second derivatives are right or refused
    for name, x in named.items():
        if has_tangent(x):
            raise NotImplementedError(
                f"attention has no forward-mode derivative, but {name} carries a tangent; go backward"
            )


def check_modifiers(q: Tensor, plan: Plan) -> None:
    """Raises where functions of scores are none, or hold what is elsewhere."""
    functions = [("mask_mod", mask.mask_mod, False) for mask in plan.masks]
    for name, function, scores in (*functions, ("score_mod", plan.score.score_mod, True)):
        if function is None:
            continue
        for x in captured(function):
            if x.device != q.device:
                raise ValueError(
                    f"what a {name} holds must be on {q.device}, as q is, got a tensor on {x.device}"
                )
        corners = _corners(q, plan)
        if q.device.type != "meta" and corners is not None:
            like = q.new_empty((), dtype=accumulation_dtype(q.dtype))
            check_modifier(name, function, corners, like, scores=scores)


def _corners(q: Tensor, plan: Plan) -> list[tuple[int, int]] | None:
    """The first and last batch entry, head, row and column of a call; `None` where one has none."""
    row, col = plan.masks[0].shift
    sizes = q.shape[0], q.shape[2], plan.layout.length, plan.keys.length
    starts = 0, plan.first_head, row, col
    if not all(sizes):
        return None
    return [(start, start + size - 1) for start, size in zip(starts, sizes, strict=True)]
