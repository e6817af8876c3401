"""What a rank holds of a sequence and of a batch: shard, restore, shift labels, pad, add positions."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from seqpar.ahead import ends_of_documents, tokens_ahead
from seqpar.batches import padded, sequences_of
from seqpar.calls.options import told
from seqpar.comm import Group, agreed, agreed_backward, all_gather
from seqpar.layout import (
    Layout,
    LayoutKind,
    Mask,
    check_kind,
    check_local,
    check_mark,
    check_rows,
    check_size,
    check_whole,
    layout_of,
    mark,
)
from seqpar_kernels.integers import is_integer
from seqpar_kernels.transfer import on_device

Labels = Literal["next", "next_in_document", "own"]
IGNORE = -100  # the label that losses skip, as in torch and transformers


def shard_sequence(x: Tensor, layout: Layout, rank: int, dim: int = 1) -> Tensor:
    """The rows of `x` along `dim` that `rank` holds, in its order, contiguous. Differentiable.

    They know their layout: as q, k or v of a plan with another one they are refused.

    Raises:
        ValueError: x is not `layout.length` long along `dim`, or the layout has no such rank.
        TypeError: x is a DTensor.
    """
    check_whole(x, "x", dim)
    if x.shape[dim] != layout.length:
        raise ValueError(
            f"x must be {layout.length} long along dim {dim} for {layout}, got {tuple(x.shape)}"
        )
    if not 0 <= rank < layout.size:
        raise ValueError(f"rank must be one of 0 ... {layout.size - 1}, got {rank}")
    shard = x.index_select(dim, on_device(layout.positions(rank), x.device))
    return mark(shard, layout) if dim % x.ndim == 1 else shard


def unshard_sequence(x: Tensor, layout: Layout, group: Group, dim: int = 1) -> Tensor:
    """The whole sequence, in order, on every rank: the inverse of `shard_sequence`. All ranks call.

    Differentiable: the gradient of a rank's rows is the sum of what all ranks send back for them. So
    a loss computed on every rank from the whole counts P times; compute it on one, or divide.

    Raises:
        ValueError: x does not hold this rank's rows, or the layout is for another number of ranks.
        TypeError: x is a DTensor.
        DesyncError: ranks differ in layout, dtype or the other dimensions.
    """
    with agreed(group, operation="unshard_sequence") as claim:
        _check_shard(x, layout, group, dim)
        group.transport.check_device(x.device)
        needs_grad = x.requires_grad and torch.is_grad_enabled()
        other_dims = [n for i, n in enumerate(x.shape) if i != dim % x.ndim]
        claim |= {
            **told(layout=layout),
            "dtype": x.dtype,
            "dim": dim % x.ndim,
        }
        claim |= {"other dims": other_dims, "requires_grad": needs_grad}
    gathered = all_gather(x, group, layout.rows, dim)
    (gathered,) = agreed_backward([gathered], group, operation="unshard_sequence")
    return gathered.index_select(dim, on_device(layout.inverse(), x.device))


def shard_batch(
    batch: Mapping[str, Any],
    group: Group,
    kind: LayoutKind = "zigzag",
    *,
    multiple_of: int = 1,
    mask: Mask | Sequence[Mask] | None = None,
    pad_to_multiple_of: int | None = None,
    pad_token_id: int | None = None,
    whole: Iterable[str] = (),
    labels: Labels = "next",
    labels_ahead: int | None = None,
    sequences: Iterable[str] = (),
    shifted: Iterable[str] = (),
) -> tuple[dict[str, Any], Layout]:
    """This rank's rows of a batch that every rank holds whole, and the layout. All ranks must call.

    `labels` come unshifted, one per token of `input_ids`, and are shifted here, before sharding: row i
    gets the label of position i + 1, the last position -100. Compare them with the logits of the same
    row, with no further shift. `position_ids` `[b sl]` are added unless given. Nothing is padded
    unless asked; padded rows come last and have label -100.

    Args:
        batch: tensors `[b s ...]` under the names in `seqpar.batches.SEQUENCES`; what is not a tensor, under
            other names, is passed on as it is.
        kind: "contiguous", "zigzag", "striped", or "balanced", which needs `mask`; or a function that makes
            layouts as `seqpar.zigzag` does; or a `seqpar.Layout` of sequences of just this (padded) length.
        multiple_of: shards are cut at multiples of this many positions.
        mask: what is attended under, or for each batch entry: "balanced" evens out the work that it makes.
        pad_to_multiple_of: pad the sequence to a multiple of this; needs `pad_token_id`.
        pad_token_id: for `input_ids` of padded rows.
        whole: names of tensors to pass on unsharded.
        labels: "next" where a row predicts the next token; the last row of a packed document then
            predicts the first token of the next one. "next_in_document" gives it -100 instead; the
            documents are those of `mask`. "own" where a row predicts its own token, as in masked
            language models; those are not shifted.
        labels_ahead: of how many tokens ahead there are labels, k. `labels` stay those of the next token,
            for the main head. Added are `labels_ahead` `[k-1 b sl]`, of the tokens 2 ... k ahead, and
            `input_ids_ahead` `[k-1 b sl]` (or `inputs_embeds_ahead`), the tokens 1 ... k - 1 ahead: a `zip`
            of both gives each block of multi-token prediction what it takes and what it predicts. Where
            there is no such token, with "next_in_document" in the same document, the label is -100 and the
            id 0. Such a row has no label, and under a causal mask no row that has one sees it.
        sequences: names of more tensors `[b s ...]` to shard. They are NOT shifted, nor are integers: entry
            i stays with row i, whose label is that of token i + 1. Padded rows have 0, or False.
        shifted: names of more tensors `[b s ...]` whose entry i belongs to token i, and is wanted where that
            is predicted, such as `loss_mask` or `advantages` of tokens. They are shifted as labels are: row
            i gets entry i + 1, and 0, or False, where there is no such token. Padded rows have the same.

    Raises:
        ValueError: no sequence in the batch, sequences of different lengths, a tensor of unknown name,
            an unknown kind or labels, a layout that does not fit, "balanced" without a mask,
            "next_in_document" without documents, no positive multiple_of or labels_ahead, documents that do
            not end where the (padded) sequence does, padding without a pad token, `labels_ahead` without
            labels, `labels_ahead` or `shifted` of "own" labels, or names in `sequences` and `shifted` that
            are not in the batch, or elsewhere too.
        TypeError: what bears the name of a sequence is no tensor or a DTensor, or kind says no layout.
        NotImplementedError: `attention_mask` hides some token: attention takes no padding mask.
        DesyncError: ranks differ in their batch or options, or another rank raised one of the above.
    """
    with agreed(group, operation="shard_batch") as claim:
        # Sorted, since sets of names have another order in each process.
        whole, sequences, shifted = map(sorted, (whole, sequences, shifted))
        claim |= {"multiple_of": multiple_of, "mask": mask, "whole": whole}
        claim |= {"labels": labels, "labels_ahead": labels_ahead}
        claim |= {"sequences": sequences, "shifted": shifted}
        claim |= {"pad": (pad_to_multiple_of, pad_token_id)}
        _check_options(kind, labels, labels_ahead, shifted)
        tensors = sequences_of(batch, whole, [*sequences, *shifted])
        # docs/design.md: `shard_batch` compares the ranks' batches
        claim |= {f"batch[{name!r}]": fingerprint(x) for name, x in tensors.items()}
        if pad_to_multiple_of is not None:
            tensors = _pad(tensors, pad_to_multiple_of, pad_token_id)
        first = next(iter(tensors.values()))
        num_sequences, length = first.shape[:2]
        ends = torch.tensor([[length]])
        if labels == "next_in_document":
            ends = ends_of_documents(mask, length, num_sequences)
        further = {} if labels_ahead is None else _further(batch, tensors, labels_ahead, ends)
        if labels != "own":
            for name in tensors.keys() & {"labels", *shifted}:
                fill = IGNORE if name == "labels" else 0
                (tensors[name],) = tokens_ahead(tensors[name], range(1, 2), ends, fill)
        layout = layout_of(kind, length, group.size, multiple_of=multiple_of, mask=mask)
        claim |= told(layout=layout)

    shards = {name: shard_sequence(x, layout, group.rank) for name, x in tensors.items()}
    shards |= {name: shard_sequence(x, layout, group.rank, dim=2) for name, x in further.items()}
    if "position_ids" not in shards:
        positions = on_device(layout.positions(group.rank), first.device)
        shards["position_ids"] = positions.expand(num_sequences, -1)
    return dict(batch) | shards, layout


def _check_shard(x: Tensor, layout: Layout, group: Group, dim: int) -> None:
    check_local(x, "x", dim)
    check_size(layout, group.size)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"x has no dim {dim}, got {tuple(x.shape)}")
    check_rows(layout, group.rank, x.shape[dim], f"{tuple(x.shape)}, sharded along dim {dim}")
    if dim % x.ndim == 1:
        check_mark(x, layout, "x")


def _check_options(
    kind: LayoutKind, labels: str, labels_ahead: int | None, shifted: Sequence[str]
) -> None:
    check_kind(kind)
    if labels not in get_args(Labels):
        raise ValueError(f"labels must be one of {get_args(Labels)}, got {labels!r}")
    if labels_ahead is not None and not (is_integer(labels_ahead) and labels_ahead > 0):
        raise ValueError(f"labels_ahead must be a positive integer, got {labels_ahead!r}")
    if labels == "own" and (labels_ahead is not None or shifted):
        raise ValueError(
            "with labels='own' a row predicts its own token: nothing is ahead or shifted, got "
            f"{labels_ahead=} {shifted=}; name tensors in sequences="
        )


def _pad(tensors: dict[str, Tensor], multiple: int, pad_token_id: int | None) -> dict[str, Tensor]:
    if multiple < 1 or pad_token_id is None:
        raise ValueError(
            f"padding needs a positive multiple and a pad_token_id, got {multiple=} {pad_token_id=}"
        )
    fills = {"input_ids": pad_token_id, "labels": IGNORE, "attention_mask": 1}
    return padded(tensors, multiple, fills)


def _further(
    batch: Mapping[str, Any], tensors: dict[str, Tensor], num: int, ends: Tensor
) -> dict[str, Tensor]:
    """The labels of the tokens 2 ... num ahead, and the tokens before these: `[num-1 b s ...]`."""
    if "labels" not in tensors:
        raise ValueError(f"labels_ahead needs labels in the batch, got {list(batch)}")
    found = {"labels_ahead": tokens_ahead(tensors["labels"], range(2, num + 1), ends, IGNORE)}
    for name in ("input_ids", "inputs_embeds"):
        if name in tensors:
            found[f"{name}_ahead"] = tokens_ahead(tensors[name], range(1, num), ends, 0)
    taken = [name for name in found if name in batch]
    if taken:
        raise ValueError(f"the batch has {taken} already, which labels_ahead= makes; rename them")
    return found


def fingerprint(x: Tensor) -> str:
    """Shape, type and, of integers, content: ranks that load different batches train on nonsense."""
    content = ""
    if not x.is_floating_point() and x.numel():
        here = x.detach().cpu().contiguous()
        raw = ctypes.string_at(here.data_ptr(), here.numel() * here.element_size())
        content = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return f"{tuple(x.shape)} {x.dtype} {content}"
