"""What a call must fulfil, checked on every rank and agreed before the first collective."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqpar.comm import Group, agreed
from seqpar.layout import Layout, Mask
from seqpar.strategies.plan import STRATEGY_NAMES, Plan
from seqpar_kernels import Dropout, Request, Score, choose

VERSION = "0.1.0"


def agree_on_call(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    """Returns if this call is legal here and the same on all ranks. All ranks must call.

    Raises:
        TypeError: an argument is of the wrong kind, or a tensor not floating point.
        ValueError: shapes, devices, heads or rows do not fit together or do not fit the layout.
        NotImplementedError: no implementation serves this device and dtype.
        DesyncError: ranks differ, or another rank raised one of the above.
    """
    if not isinstance(plan, Plan) or not isinstance(plan.group, Group):
        raise TypeError(f"attention takes a seqpar.Plan with a seqpar.Group, got {plan!r}")
    with agreed(plan.group, "attention") as claim:
        _check_plan(plan)
        _check_tensors(q, k, v)
        _check_rows(q, k, v, plan)
        _check_heads(q, plan.score)
        claim |= _claim(q, k, v, plan)


def _check_plan(plan: Plan) -> None:
    for name, kind in (("layout", Layout), ("mask", Mask), ("score", Score)):
        value = getattr(plan, name)
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a seqpar.{kind.__name__}, got {value!r}")
    if plan.dropout is not None and not isinstance(plan.dropout, Dropout):
        raise TypeError(f"dropout must be a seqpar.Dropout or None, got {plan.dropout!r}")
    if plan.strategy not in STRATEGY_NAMES:
        raise ValueError(f"strategy must be one of {STRATEGY_NAMES}, got {plan.strategy!r}")
    layout, group, documents = plan.layout, plan.group, plan.mask.documents
    if layout.size != group.size:
        raise ValueError(
            f"the layout must be for the {group.size} ranks of the group, got {layout}; "
            f"make it with seqpar.{layout.kind}({layout.length}, group.size)"
        )
    if documents is not None and documents[-1] != layout.length:
        raise ValueError(
            f"documents must end where the sequence does, at {layout.length}, got {documents[-1]}"
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
    rank, layout = plan.group.rank, plan.layout
    rows = layout.rows[rank]
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.shape[1] != rows:
            raise ValueError(
                f"rank {rank} of {layout.size} must hold {rows} of the {layout.length} positions "
                f"({layout.kind}), got {name} {tuple(x.shape)} as [b sl h d]; "
                "shard with seqpar.shard_sequence"
            )


def _check_heads(q: Tensor, score: Score) -> None:
    for name in ("alibi_slopes", "sinks"):
        x = getattr(score, name)
        if x is not None and x.shape[0] != q.shape[2]:
            raise ValueError(
                f"{name} must have one entry for each of the {q.shape[2]} query heads, "
                f"got {tuple(x.shape)}"
            )
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _claim(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> dict[str, Any]:
    score = plan.score.resolve(q.shape[3])
    learned = {"alibi_slopes": score.alibi_slopes, "sinks": score.sinks}
    grad = torch.is_grad_enabled()
    needs = [x.requires_grad and grad for x in (q, k, v, *learned.values()) if x is not None]
    return {
        "version": VERSION,
        "strategy": plan.strategy,
        "layout": plan.layout,
        "spans": hash(plan.layout.spans),
        "mask": plan.mask,
        "scale": score.scale,
        "softcap": score.softcap,
        **{name: None if x is None else x.dtype for name, x in learned.items()},
        "dropout": plan.drops,
        "implementation": choose(
            Request.of(q, v, score, plan.drops, plan.packed), plan.implementation
        ),
        "batch": q.shape[0],
        "heads (hq, hkv)": (q.shape[2], k.shape[2]),
        "widths (d, vd)": (q.shape[3], v.shape[3]),
        "dtype": q.dtype,
        "device": q.device.type,
        "requires_grad": any(needs),
    }
