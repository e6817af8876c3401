"""Checks what the calls of a cache must fulfil. Sends nothing; raises what every rank is then told."""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.calls.check_tensors import check_tensors_of
from seqpar.comm import Group
from seqpar.decode.rows import Held
from seqpar.layout import Layout, Mask, check_local, check_rows, check_size
from seqpar_kernels import Score


def check_prefill(
    group: Group, layout: Layout, k: Tensor, v: Tensor, mask: Mask, score: Score
) -> None:
    """Raises where a cache cannot be made of these arguments."""
    for name, value, kind in (
        ("layout", layout, Layout), ("mask", mask, Mask), ("score", score, Score),
    ):  # fmt: skip
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a seqpar.{kind.__name__}, got {value!r}")
    _check_tensors({"k": k, "v": v}, score)
    shapes = f"k {tuple(k.shape)}, v {tuple(v.shape)}"
    if k.shape[:3] != v.shape[:3] or 0 in k.shape[2:] or v.shape[3] == 0:
        raise ValueError(
            f"k and v must have one batch, length and some heads and widths, got {shapes}"
        )
    check_size(layout, group.size)
    check_rows(layout, group.rank, k.shape[1], f"{shapes} as [b sl h d]")
    if mask.mask_mod is not None or any(term.has_sums for term in score.terms):
        raise NotImplementedError("a cache takes neither a mask_mod, a score_mod nor a bias")
    if mask.pair is not None:
        raise ValueError(
            "a cache holds one sequence: documents must be the boundaries of its keys alone, "
            f"got a pair {mask.pair}"
        )
    if mask.regions is not None and mask.lengths is not None:
        raise NotImplementedError(
            "a cache grows, and documents that `&` or `|` joined with another mask end; give them as "
            "Mask(documents=...), which a cache leaves open"
        )
    if mask.documents is not None and mask.documents[-1] != layout.length:
        raise ValueError(
            f"documents must end where the prefill does, at {layout.length}, got {mask.documents[-1]}"
        )
    if mask.align == "top-left":
        raise ValueError(
            "queries of a cache stand over its last keys, not over the first as 'top-left' says"
        )


def check_new(k: Tensor, v: Tensor, held: Held, score: Score) -> None:
    """Raises where new keys and values do not fit those that are held."""
    _check_tensors({"k": k, "v": v}, score)
    _check_like(k, held.k)
    for name, x, old in (("k", k, held.k), ("v", v, held.v)):
        if (x.shape[0], *x.shape[2:]) != (old.shape[0], *old.shape[2:]) or x.shape[1] != k.shape[1]:
            expected = f"[{old.shape[0]} t {old.shape[2]} {old.shape[3]}]"
            raise ValueError(f"new {name} must be {expected}, got {tuple(x.shape)}")


def check_queries(q: Tensor, length: int, held: Held, score: Score) -> None:
    """Raises where these queries cannot be the last rows of the sequence."""
    _check_tensors({"q": q}, score)
    _check_like(q, held.k)
    b, t, hq, d = q.shape
    old_b, _, hkv, old_d = held.k.shape
    if b != old_b or d != old_d or hq == 0 or hq % hkv:
        raise ValueError(
            f"q must be [{old_b} t hq {old_d}] with hq a multiple of {hkv}, got {tuple(q.shape)}"
        )
    if t > length:
        raise ValueError(
            f"queries are the last positions of the {length} in the cache, got {t}; append first"
        )
    check_tensors_of(score, q, (length, length))


def _check_tensors(named: dict[str, Tensor], score: Score) -> None:
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        check_local(x, name)
        if x.ndim != 4:
            raise ValueError(f"{name} must be 4-D, [b t h d], got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    first = next(iter(named.values()))
    for x in named.values():
        _check_like(x, first)
    for name, learns in {**named, **score.tensors}.items():
        if learns.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"a cache has no gradients, and {name} requires one; decode under torch.no_grad()"
            )


def _check_like(x: Tensor, held: Tensor) -> None:
    if (x.dtype, x.device) != (held.dtype, held.device):
        raise ValueError(
            f"queries, keys and values must have one dtype and device, {held.dtype} on "
            f"{held.device}, got {x.dtype} on {x.device}"
        )
