"""The masks of torch's `MultiheadAttention` as those of this package; whole tensors, or this rank's rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from seqpar.data import unshard_sequence
from seqpar.layout import Layout, Mask
from seqpar.layout.dense import runs_of
from seqpar.masks import MOST_LAYERS, Table, dense, key_runs
from seqpar.strategies.plan import Plan

CAUSAL = Mask(causal=True, align="top-left")


@dataclass(frozen=True)
class TorchMasks:
    """What torch's module is told to hide, or to add to scores.

    Args:
        key_padding_mask: `[b skv]` of all keys, or `[b slk]` of those of this rank; True is hidden, and so is
            -inf in a floating point mask, where all else is 0.
        attn_mask: `[i skv]` or `[b*h i skv]` of all rows, or of those of this rank, over all keys; True is
            hidden, and what is floating point is added to scores.
        is_causal: whether rows see no key after them, besides.
    """

    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    is_causal: bool

    def check(
        self, batch: int, heads: int, layout: Layout, keys: Layout, rank: int
    ) -> dict[str, object]:
        """What ranks have to agree on.

        Raises:
            ValueError: a shape does not fit, or padding is neither hidden nor 0.
            TypeError: a mask is no tensor of booleans or floats, or is_causal no bool.
        """
        if not isinstance(self.is_causal, bool):
            raise TypeError(f"is_causal must be a bool, got {self.is_causal!r}")
        return {
            "is_causal": self.is_causal,
            "key_padding_mask": self._check_padding(batch, keys, rank),
            "attn_mask": self._check_scores(batch * heads, layout, keys, rank),
        }

    @property
    def say_nothing(self) -> bool:
        """Whether nothing is hidden or added."""
        return self.is_causal is False and self.key_padding_mask is None and self.attn_mask is None

    def gathered(self, plan: Plan) -> TorchMasks:
        """The same of all rows and keys, where they were those of this rank. All ranks must call."""
        padding, added = self.key_padding_mask, self.attn_mask
        padding = None if padding is None else _gathered(padding, plan.keys, plan, dim=1)
        added = None if added is None else _gathered(added, plan.layout, plan, dim=-2)
        return TorchMasks(padding, added, self.is_causal)

    def applied(self, plan: Plan, batch: int) -> Plan:
        """The plan with these masks, which are `gathered`, besides its own.

        Raises:
            ValueError: rows stand elsewhere in its own mask.
        """
        mask = _joined(plan.mask, [CAUSAL] * batch) if self.is_causal else plan.mask
        if self.key_padding_mask is not None:
            hidden = _hidden(self.key_padding_mask)
            mask = _joined(mask, [_of_keys(~x) for x in hidden])
        if self.attn_mask is None:
            return replace(plan, mask=mask)
        given = self.attn_mask
        given = given.unflatten(0, (batch, -1)) if given.ndim == 3 else given
        plan = replace(plan, mask=_joined(mask, _shown(~_hidden(given.detach()), batch)))
        if given.dtype == torch.bool or not (given.requires_grad or _adds(given)):
            return plan
        bias = given.masked_fill(_hidden(given), 0.0)
        bias = bias if plan.score.bias is None else bias + plan.score.bias
        return replace(plan, score=replace(plan.score, bias=bias))

    def _check_padding(self, batch: int, keys: Layout, rank: int) -> object:
        x = self.key_padding_mask
        if x is None:
            return None
        _check_kind("key_padding_mask", x)
        lengths = keys.length, keys.rows[rank]
        if x.ndim != 2 or x.shape[0] != batch or x.shape[1] not in lengths:
            raise ValueError(
                f"key_padding_mask must be [{batch} {lengths[0]}] of all keys, or [{batch} {lengths[1]}] of "
                f"those of this rank, got {tuple(x.shape)}"
            )
        if x.is_floating_point() and _adds(x):
            raise ValueError(
                "a floating point key_padding_mask must be 0 or -inf; what is added to scores is an attn_mask"
            )
        return _whole(x.shape[1], *lengths), x.dtype

    def _check_scores(self, together: int, layout: Layout, keys: Layout, rank: int) -> object:
        x = self.attn_mask
        if x is None:
            return None
        _check_kind("attn_mask", x)
        lengths = layout.length, layout.rows[rank]
        fits = x.ndim == 2 or (x.ndim == 3 and x.shape[0] == together)
        if not fits or x.shape[-1] != keys.length or x.shape[-2] not in lengths:
            raise ValueError(
                f"attn_mask must be [i {keys.length}] or [{together} i {keys.length}], where i is "
                f"{lengths[0]} for all rows or {lengths[1]} for those of this rank, got {tuple(x.shape)}"
            )
        return _whole(x.shape[-2], *lengths), x.dtype, x.ndim, x.requires_grad


@dataclass(frozen=True, eq=False)
class Keys:
    """A `mask_mod` that shows some keys to all rows."""

    shown: Bool[Tensor, "j"]

    def __call__(self, batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:  # noqa: ARG002
        """Whether the key is one of them."""
        return self.shown[col]


def _gathered(x: Tensor, layout: Layout, plan: Plan, dim: int) -> Tensor:
    """The whole tensor, of which this rank may have its rows."""
    return x if x.shape[dim] == layout.length else unshard_sequence(x, layout, plan.group, dim=dim)


def _whole(got: int, whole: int, own: int) -> str:
    """Whether a tensor is whole; where one rank has all of the rows, ranks need not tell."""
    return "any" if whole == own == got else "whole" if got == whole else "rows"


def _check_kind(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not (x.dtype == torch.bool or x.is_floating_point()):
        raise TypeError(
            f"{name} must be a tensor of booleans or floats, got {getattr(x, 'dtype', x)}"
        )


def _hidden(x: Tensor) -> Bool[Tensor, "*w"]:
    return x if x.dtype == torch.bool else x == -torch.inf


def _adds(x: Tensor) -> bool:
    """Whether a floating point mask does more than hide."""
    return bool(((x != 0) & (x != -torch.inf)).any())


def _of_keys(shown: Bool[Tensor, "j"]) -> Mask:
    """All rows see these keys."""
    (runs,) = runs_of(shown[None].cpu())
    return key_runs(runs) if len(runs) <= MOST_LAYERS else Mask(mask_mod=Keys(shown))


def _shown(shown: Bool[Tensor, "*b i j"], batch: int) -> list[Mask]:
    """A mask for each batch entry, of one tensor for all or `[b h i j]`."""
    if shown.ndim == 2:
        return [dense(shown)] * batch
    if bool((shown == shown[:, :1]).all()):
        return [dense(x[0]) for x in shown]
    lengths = shown.shape[-2], shown.shape[-1]
    return [Mask(align="top-left", lengths=lengths, mask_mod=Table(shown))] * batch


def _joined(own: Mask | tuple[Mask, ...], others: list[Mask]) -> Mask | tuple[Mask, ...]:
    """What both show, by batch entry; one mask where all are equal."""
    if not others:
        return own
    owns = own if isinstance(own, tuple) else (own,) * len(others)
    if len(owns) != len(others):
        return own  # of another batch, which the call refuses
    joined = {pair: pair[0] & pair[1] for pair in dict.fromkeys(zip(owns, others, strict=True))}
    masks = tuple(joined[pair] for pair in zip(owns, others, strict=True))
    return masks[0] if len(set(masks)) == 1 else masks
