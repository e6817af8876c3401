"""What surrounds attention in training: shard, restore, prepare batches, reduce losses and gradients."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqpar.comm import Group, agreed, all_gather, all_reduce, all_reduce_
from seqpar.layout import LAYOUTS, Layout, Mask, balanced

Labels = Literal["next", "own"]
IGNORE = -100  # the label that losses skip, as in torch and transformers
SEQUENCES = (
    "input_ids", "inputs_embeds", "labels", "attention_mask", "position_ids", "token_type_ids",
)  # fmt: skip


def shard_sequence(x: Tensor, layout: Layout, rank: int, dim: int = 1) -> Tensor:
    """The rows of `x` along `dim` that `rank` holds, in its order, contiguous. Differentiable.

    Raises:
        ValueError: x is not `layout.length` long along `dim`, or the layout has no such rank.
    """
    if x.shape[dim] != layout.length:
        raise ValueError(
            f"x must be {layout.length} long along dim {dim} for {layout}, got {tuple(x.shape)}"
        )
    if not 0 <= rank < layout.size:
        raise ValueError(f"rank must be one of 0 ... {layout.size - 1}, got {rank}")
    return x.index_select(dim, layout.positions(rank).to(x.device))


def unshard_sequence(x: Tensor, layout: Layout, group: Group, dim: int = 1) -> Tensor:
    """The whole sequence, in order, on every rank: the inverse of `shard_sequence`. All ranks call.

    Differentiable: the gradient of a rank's rows is the sum of what all ranks send back for them. So
    a loss computed on every rank from the whole counts P times; compute it on one, or divide.

    Raises:
        ValueError: x does not hold this rank's rows, or the layout is for another number of ranks.
        DesyncError: ranks differ in layout, dtype or the other dimensions.
    """
    with agreed(group, "unshard_sequence") as claim:
        _check_shard(x, layout, group, dim)
        needs_grad = x.requires_grad and torch.is_grad_enabled()
        other_dims = [n for i, n in enumerate(x.shape) if i != dim % x.ndim]
        claim |= {
            "layout": layout,
            "spans": hash(layout.spans),
            "dtype": x.dtype,
            "dim": dim % x.ndim,
        }
        claim |= {"other dims": other_dims, "requires_grad": needs_grad}
    gathered = all_gather(x, group, layout.rows, dim)
    return gathered.index_select(dim, layout.inverse().to(x.device))


def shard_batch(
    batch: Mapping[str, Any],
    group: Group,
    kind: str = "zigzag",
    *,
    multiple_of: int = 1,
    mask: Mask | None = None,
    pad_to_multiple_of: int | None = None,
    pad_token_id: int | None = None,
    whole: Iterable[str] = (),
    labels: Labels = "next",
) -> tuple[dict[str, Any], Layout]:
    """This rank's rows of a batch that every rank holds whole, and the layout. All ranks must call.

    `labels` come unshifted, one per token of `input_ids`, and are shifted here, before sharding: row i
    gets the label of position i + 1, the last position -100. Compare them with the logits of the same
    row, with no further shift. `position_ids` `[b sl]` are added unless given. Nothing is padded
    unless asked; padded rows come last and have label -100.

    Args:
        batch: tensors `[b s ...]` under the names in `seqpar.data.SEQUENCES`; anything else that is
            not a tensor is passed on as it is.
        kind: "contiguous", "zigzag", "striped", or "balanced", which needs `mask`.
        multiple_of: shards are cut at multiples of this many positions.
        mask: what is attended under: "balanced" evens out the work that it makes, others ignore it.
        pad_to_multiple_of: pad the sequence to a multiple of this; needs `pad_token_id`.
        pad_token_id: for `input_ids` of padded rows.
        whole: names of tensors to pass on unsharded.
        labels: "next" where a row predicts the next token, "own" where it predicts its own, as in masked
            language models; those are not shifted.

    Raises:
        ValueError: no sequence in the batch, sequences of different lengths, a tensor of unknown name,
            an unknown kind or labels, "balanced" without a mask, no positive multiple_of, documents that do
            not end where the (padded) sequence does, or padding without a pad token.
        NotImplementedError: `attention_mask` hides some token: attention takes no padding mask.
        DesyncError: ranks differ in their batch or options, or another rank raised one of the above.
    """
    whole = tuple(whole)
    with agreed(group, "shard_batch") as claim:
        if labels not in get_args(Labels):
            raise ValueError(f"labels must be one of {get_args(Labels)}, got {labels!r}")
        claim |= {"kind": kind, "multiple_of": multiple_of, "mask": mask, "whole": whole}
        claim["labels"] = labels
        claim |= {"pad": (pad_to_multiple_of, pad_token_id)}
        sequences = _sequences(batch, kind, whole)
        claim |= {f"batch[{name!r}]": _fingerprint(x) for name, x in sequences.items()}
        sequences = _shift(sequences) if labels == "next" else sequences
        sequences = _pad(sequences, pad_to_multiple_of, pad_token_id)
        first = next(iter(sequences.values()))
        layout = _layout(kind, first.shape[1], group.size, multiple_of, mask)

    shards = {name: shard_sequence(x, layout, group.rank) for name, x in sequences.items()}
    if "position_ids" not in shards:
        positions = layout.positions(group.rank).to(first.device)
        shards["position_ids"] = positions.expand(first.shape[0], -1)
    return dict(batch) | shards, layout


def mean_loss(
    token_losses: Float[Tensor, "*tokens"],
    group: Group,
    *,
    valid: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The mean over the valid tokens of all ranks, the same on every rank. All ranks must call.

    A rank may hold no valid token, or no token; if nobody has one the mean is 0. Each rank's backward
    gives its own tokens' part of the gradient of that mean, so the gradients of one device are the
    *sum* over ranks (`seqpar.sum_gradients`). Wrappers that average gradients instead, like DDP, need
    this loss times `group.size`.

    Args:
        token_losses: the loss of every token of this rank, not yet reduced, any shape.
        valid: which of them count; by default all. Losses that do not count may be NaN.

    Raises:
        ValueError: valid has another shape than token_losses.
        TypeError: valid is not bool.
        DesyncError: ranks differ in dtype, or another rank raised.
    """
    with agreed(group, "mean_loss") as claim:
        claim["dtype"] = token_losses.dtype
        if valid is not None and valid.dtype != torch.bool:
            raise TypeError(f"valid must be bool, got {valid.dtype}")
        if valid is not None and valid.shape != token_losses.shape:
            shapes = f"got {tuple(valid.shape)} for {tuple(token_losses.shape)}"
            raise ValueError(f"valid must have the shape of token_losses, {shapes}")
    wide = torch.promote_types(token_losses.dtype, torch.float32)
    counted = token_losses if valid is None else token_losses.masked_fill(~valid, 0.0)
    num_tokens = token_losses.numel() if valid is None else valid.sum()
    num_valid = torch.as_tensor(num_tokens, dtype=torch.float64, device=token_losses.device).clone()
    all_reduce_(num_valid, group)
    total = all_reduce(counted.sum(dtype=wide), group)
    return total / num_valid.clamp(min=1.0).to(wide)


def sum_gradients(parameters: Iterable[Tensor], group: Group) -> None:
    """Replaces the gradients of replicated parameters by their sum over ranks, in place. All call.

    A parameter without a gradient here counts as zero, so ranks that saw no token need no care; one
    that no rank has a gradient for keeps none. Gradients of 16 bits are added in float32.

    Raises:
        DesyncError: ranks differ in the shapes or dtypes of their parameters, or another rank raised.
        NotImplementedError: a gradient is sparse.
    """
    params = list(dict.fromkeys(p for p in parameters if p.requires_grad))
    with agreed(group, "sum_gradients") as claim:
        claim["parameters"] = [(tuple(p.shape), p.dtype) for p in params]
        if any(p.grad is not None and p.grad.layout != torch.strided for p in params):
            raise NotImplementedError(
                "sparse gradients are not summed; use nn.Embedding(sparse=False)"
            )
    if not params:
        return
    has = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    all_reduce_(has, group)
    for p, num_ranks in zip(params, has.tolist(), strict=True):
        if num_ranks:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            wide = grad.to(torch.promote_types(p.dtype, torch.float32)).contiguous()
            all_reduce_(wide, group)
            p.grad = wide.to(p.dtype)


def _check_shard(x: Tensor, layout: Layout, group: Group, dim: int) -> None:
    if layout.size != group.size:
        raise ValueError(
            f"the layout must be for the {group.size} ranks of the group, got {layout}"
        )
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"x has no dim {dim}, got {tuple(x.shape)}")
    rows = layout.rows[group.rank]
    if x.shape[dim] != rows:
        raise ValueError(
            f"rank {group.rank} of {group.size} must hold {rows} rows along dim {dim} for {layout}, "
            f"got {tuple(x.shape)}"
        )


def _sequences(batch: Mapping[str, Any], kind: str, whole: tuple[str, ...]) -> dict[str, Tensor]:
    if kind not in (*LAYOUTS, "balanced"):
        raise ValueError(f"kind must be one of {(*LAYOUTS, 'balanced')}, got {kind!r}")
    tensors = {n: x for n, x in batch.items() if isinstance(x, Tensor) and n not in whole}
    unknown = [n for n in tensors if n not in SEQUENCES]
    if unknown:
        raise ValueError(
            f"is {unknown} a sequence? Rename it to one of {SEQUENCES} to shard it, or pass it in whole="
        )
    lengths = {n: tuple(x.shape[:2]) for n, x in tensors.items()}
    if not tensors or len(set(lengths.values())) != 1 or len(next(iter(lengths.values()))) < 2:
        raise ValueError(f"a batch needs sequences that are all [b s ...], got {lengths}")
    mask = tensors.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise NotImplementedError(
            "attention_mask hides tokens and would be ignored; pad on the right with label -100 under "
            "a causal mask, and leave attention_mask out"
        )
    return tensors


def _layout(kind: str, length: int, size: int, multiple_of: int, mask: Mask | None) -> Layout:
    if kind != "balanced":
        return LAYOUTS[kind](length, size, multiple_of=multiple_of)
    if mask is None:
        raise ValueError("kind 'balanced' evens out the work under a mask; pass it as mask=")
    return balanced(length, size, mask, multiple_of=multiple_of)


def _shift(sequences: dict[str, Tensor]) -> dict[str, Tensor]:
    if "labels" not in sequences:
        return sequences
    labels = sequences["labels"]
    shifted = torch.full_like(labels, IGNORE)
    shifted[:, :-1] = labels[:, 1:]
    return sequences | {"labels": shifted}


def _pad(
    sequences: dict[str, Tensor], multiple: int | None, pad_token_id: int | None
) -> dict[str, Tensor]:
    if multiple is None:
        return sequences
    if multiple < 1 or pad_token_id is None:
        raise ValueError(
            f"padding needs a positive multiple and a pad_token_id, got {multiple=} {pad_token_id=}"
        )
    fills = {"input_ids": pad_token_id, "labels": IGNORE, "attention_mask": 1}
    padded = {}
    for name, x in sequences.items():
        missing = -x.shape[1] % multiple
        fill = x.new_full((x.shape[0], missing, *x.shape[2:]), fills.get(name, 0))
        if name == "position_ids":
            fill += torch.arange(x.shape[1], x.shape[1] + missing, device=x.device)
        padded[name] = torch.cat([x, fill], dim=1)
    return padded


def _fingerprint(x: Tensor) -> str:
    """Shape, type and, of integers, content: ranks that load different batches train on nonsense."""
    content = ""
    if not x.is_floating_point() and x.numel():
        here = x.detach().cpu().contiguous()
        raw = ctypes.string_at(here.data_ptr(), here.numel() * here.element_size())
        content = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return f"{tuple(x.shape)} {x.dtype} {content}"
