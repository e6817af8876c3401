"""`tiled_loss`: head and cross entropy of a few rows at a time; logits of all rows are never there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from seqpar.data import IGNORE
from seqpar.row_tiles import check_tile
from seqpar_kernels import accumulation_dtype, first_only
from seqpar_kernels.partial import without_autocast


def tiled_loss(
    hidden: Float[Tensor, "*rows e"],
    weight: Float[Tensor, "classes e"],
    labels: Int[Tensor, "*rows"],
    *,
    tile: int,
    bias: Float[Tensor, "classes"] | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "*rows"]:
    """The cross entropy of each row, of `head(hidden)` and labels, with logits of a tile of rows at a time.

    For `seqpar.mean_loss(losses, everyone, valid=labels != -100)`. Losses are in float32 or wider, and 0
    where a label is -100. Backward computes logits again: four products in place of three. Products are in
    the type of `hidden`, or that of autocast; gradients of the head are summed over tiles in float32 or
    wider. Sends nothing. The host reads the labels, for which it waits for the device.

    Args:
        weight: of the head, which may be the embedding's. Under FSDP2 call this in the model's forward.
        labels: shifted, as `seqpar.shard_batch` gives them.
        tile: how many rows have logits at a time.
        softcap: logits become `softcap * tanh(logits / softcap)`, in float32 or wider; Gemma's
            `final_logit_softcapping`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: shapes do not fit, a label is no class, or an option is out of range.
        NotImplementedError: a tensor is a DTensor, or in `torch.compile(fullgraph=True)`.
    """
    check_tile(tile, *(x for x in (hidden, weight, bias) if x is not None))
    _check_shapes(hidden, weight, labels, bias)
    _check_options(labels, weight.shape[0], softcap, label_smoothing)
    head = _Head(tile, softcap, label_smoothing, _product_dtype(hidden, weight))
    return _TiledLoss.apply(head, hidden.flatten(0, -2), weight, bias, labels.long())


@dataclass(frozen=True)
class _Head:
    """What a call is besides its tensors."""

    tile: int
    softcap: float | None
    smoothing: float
    dtype: torch.dtype  # of products

    @property
    def wide(self) -> torch.dtype:
        """The type of losses and sums."""
        return accumulation_dtype(self.dtype)

    def tiles(self, rows: Tensor) -> Iterator[slice]:
        """The rows of each tile."""
        return (slice(n, n + self.tile) for n in range(0, len(rows), self.tile))

    def logits(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "i classes"]:
        """Those of a tile, in a tensor of its own."""
        logits = F.linear(rows.to(self.dtype), weight, bias).to(self.wide)
        return (
            logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
        )


class _TiledLoss(torch.autograd.Function):
    """hidden [n e], weight [classes e], bias [classes], labels [...] of n -> losses [...].

    With z the logits of a row, y its label, s the smoothing and p = softmax(z):

    forward   loss = lse(z) - (1 - s) z_y - s mean(z)
    backward  dz = dloss (p - (1 - s) onehot(y) - s / classes), times 1 - (z / softcap)^2;
              dhidden = dz weight, dweight = sum over tiles of dz^T hidden, dbias = sum over rows of dz
    saved     hidden, weight, bias, labels, lse [n]
    """

    @staticmethod
    def forward(
        ctx: Any, head: _Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        # docs/design.md: a loss in tiles computes logits twice
        low, low_bias = weight.to(head.dtype), None if bias is None else bias.to(head.dtype)
        lse = hidden.new_empty(len(hidden), dtype=head.wide)
        # Returned as it is made: FSDP warns of a view.
        whole, labels = hidden.new_empty(labels.shape, dtype=head.wide), labels.flatten()
        losses = whole.view(-1)
        with without_autocast(hidden.device):
            for rows in head.tiles(hidden):
                z = head.logits(hidden[rows], low, low_bias)
                lse[rows] = z.logsumexp(1)
                targets = labels[rows].clamp(min=0).unsqueeze(1)
                losses[rows] = lse[rows] - (1 - head.smoothing) * z.gather(1, targets).squeeze(1)
                if head.smoothing:
                    losses[rows] -= head.smoothing * z.mean(1)
                del z  # or those of two tiles would be there at once
        ctx.head = head
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        losses.masked_fill_(labels == IGNORE, 0.0)
        return whole

    @staticmethod
    @first_only
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dloss,), head = grad_outputs, ctx.head
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        low, low_bias = weight.to(head.dtype), None if bias is None else bias.to(head.dtype)
        dloss = dloss.flatten().masked_fill(labels == IGNORE, 0.0).unsqueeze(1)
        _, needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if needs_hidden else None
        dweight = torch.zeros_like(weight, dtype=head.wide) if needs_weight else None
        dbias = torch.zeros_like(bias, dtype=head.wide) if needs_bias else None
        with without_autocast(hidden.device):
            for rows in head.tiles(hidden):
                z = head.logits(hidden[rows], low, low_bias)
                slope = None if head.softcap is None else 1 - (z / head.softcap) ** 2
                dz = z.sub_(lse[rows].unsqueeze(1)).exp_()
                if head.smoothing:
                    dz -= head.smoothing / len(weight)
                dz *= dloss[rows]
                targets = labels[rows].clamp(min=0).unsqueeze(1)
                dz.scatter_add_(1, targets, (head.smoothing - 1) * dloss[rows])
                if slope is not None:
                    dz *= slope
                if dbias is not None:
                    dbias += dz.sum(0)
                dz = dz.to(head.dtype)
                if dhidden is not None:
                    dhidden[rows] = dz @ low
                if dweight is not None:
                    _add_product(dweight, dz.T, hidden[rows].to(head.dtype))
                del z, dz, slope
        return None, dhidden, _like(dweight, weight), _like(dbias, bias), None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a product to a sum, without a tensor between them where types allow."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _like(total: Tensor | None, x: Tensor) -> Tensor | None:
    return None if total is None else total.to(x.dtype)


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which `F.linear` would multiply."""
    kind = hidden.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind)
    if casts and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}"
        )
    return hidden.dtype


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim < 2 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be [rows e] for a weight [classes e], got "
            f"{tuple(hidden.shape)} for {tuple(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            "labels must be [b sl] as hidden [b sl e] is, got "
            f"{tuple(labels.shape)} for {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [{len(weight)}], one for each class, got {tuple(bias.shape)}"
        )


def _check_options(labels: Tensor, classes: int, softcap: float | None, smoothing: float) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be numbers of classes, got {labels.dtype}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap!r}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {smoothing!r}")
    # A label that is no class reads the memory of others on some devices.
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        found = labels[wrong]
        raise ValueError(
            f"labels must be 0 ... {classes - 1} or {IGNORE}, got {int(found.min())} ... {int(found.max())}"
        )
