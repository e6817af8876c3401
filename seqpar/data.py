"""What a rank holds of a sequence and of a batch: shard, restore, shift labels, pad, add positions."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from seqpar.calls.options import told
from seqpar.comm import Group, agreed, agreed_backward, all_gather
from seqpar.layout import LAYOUTS, Layout, Mask, balanced, check_mark, check_rows, check_size, mark
from seqpar_kernels.transfer import on_device

Labels = Literal["next", "next_in_document", "own"]
IGNORE = -100  # the label that losses skip, as in torch and transformers
SEQUENCES = (
    "input_ids", "inputs_embeds", "labels", "attention_mask", "position_ids", "token_type_ids",
)  # fmt: skip


def shard_sequence(x: Tensor, layout: Layout, rank: int, dim: int = 1) -> Tensor:
    """The rows of `x` along `dim` that `rank` holds, in its order, contiguous. Differentiable.

    They know their layout: as q, k or v of a plan with another one they are refused.

    Raises:
        ValueError: x is not `layout.length` long along `dim`, or the layout has no such rank.
    """
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
    kind: str = "zigzag",
    *,
    multiple_of: int = 1,
    mask: Mask | Sequence[Mask] | None = None,
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
        batch: tensors `[b s ...]` under the names in `seqpar.data.SEQUENCES`; what is not a tensor, under
            other names, is passed on as it is.
        kind: "contiguous", "zigzag", "striped", or "balanced", which needs `mask`.
        multiple_of: shards are cut at multiples of this many positions.
        mask: what is attended under, or for each batch entry: "balanced" evens out the work that it makes.
        pad_to_multiple_of: pad the sequence to a multiple of this; needs `pad_token_id`.
        pad_token_id: for `input_ids` of padded rows.
        whole: names of tensors to pass on unsharded.
        labels: "next" where a row predicts the next token; the last row of a packed document then
            predicts the first token of the next one. "next_in_document" gives it -100 instead; the
            documents are those of `mask`. "own" where a row predicts its own token, as in masked
            language models; those are not shifted.

    Raises:
        ValueError: no sequence in the batch, sequences of different lengths, a tensor of unknown name,
            an unknown kind or labels, "balanced" without a mask, "next_in_document" without documents, no
            positive multiple_of, documents that do not end where the (padded) sequence does, or padding
            without a pad token.
        TypeError: what bears the name of a sequence is no tensor.
        NotImplementedError: `attention_mask` hides some token: attention takes no padding mask.
        DesyncError: ranks differ in their batch or options, or another rank raised one of the above.
    """
    whole = tuple(whole)
    with agreed(group, operation="shard_batch") as claim:
        if labels not in get_args(Labels):
            raise ValueError(f"labels must be one of {get_args(Labels)}, got {labels!r}")
        claim |= {"kind": kind, "multiple_of": multiple_of, "mask": mask, "whole": whole}
        claim["labels"] = labels
        claim |= {"pad": (pad_to_multiple_of, pad_token_id)}
        sequences = _sequences(batch, kind, whole)
        # docs/design.md: `shard_batch` compares the ranks' batches
        claim |= {f"batch[{name!r}]": fingerprint(x) for name, x in sequences.items()}
        sequences = sequences if labels == "own" else _shift(sequences)
        sequences = _pad(sequences, pad_to_multiple_of, pad_token_id)
        first = next(iter(sequences.values()))
        if labels == "next_in_document":
            _ignore_borders(sequences, mask)
        layout = _layout(kind, first.shape[1], group.size, multiple_of, mask)

    shards = {name: shard_sequence(x, layout, group.rank) for name, x in sequences.items()}
    if "position_ids" not in shards:
        positions = on_device(layout.positions(group.rank), first.device)
        shards["position_ids"] = positions.expand(first.shape[0], -1)
    return dict(batch) | shards, layout


def _check_shard(x: Tensor, layout: Layout, group: Group, dim: int) -> None:
    check_size(layout, group.size)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"x has no dim {dim}, got {tuple(x.shape)}")
    check_rows(layout, group.rank, x.shape[dim], f"{tuple(x.shape)}, sharded along dim {dim}")
    if dim % x.ndim == 1:
        check_mark(x, layout, "x")


def _sequences(batch: Mapping[str, Any], kind: str, whole: tuple[str, ...]) -> dict[str, Tensor]:
    if kind not in (*LAYOUTS, "balanced"):
        raise ValueError(f"kind must be one of {(*LAYOUTS, 'balanced')}, got {kind!r}")
    tensors = {n: x for n, x in batch.items() if isinstance(x, Tensor) and n not in whole}
    others = [n for n in SEQUENCES if n not in tensors and n not in whole]
    wrong = {n: type(batch[n]).__name__ for n in others if batch.get(n) is not None}
    if wrong:
        raise TypeError(f"sequences must be tensors [b s ...] to be sharded, got {wrong}")
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


Masks = Mask | Sequence[Mask] | None


def _layout(kind: str, length: int, size: int, multiple_of: int, mask: Masks) -> Layout:
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


def _ignore_borders(sequences: dict[str, Tensor], mask: Masks) -> None:
    """Takes the label from the last row of every document, in place: `_shift` has made it a copy."""
    if not isinstance(mask, Mask) or mask.documents is None or mask.pair is not None:
        raise ValueError(
            "labels='next_in_document' asks for the documents, in mask=seqpar.Mask(documents=...)"
        )
    length = next(iter(sequences.values())).shape[1]
    if mask.bounds[-1] != length:
        raise ValueError(f"documents must end where the sequence does, at {length}, got {mask}")
    if "labels" in sequences:
        sequences["labels"][:, [end - 1 for end in mask.bounds if end]] = IGNORE


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


def fingerprint(x: Tensor) -> str:
    """Shape, type and, of integers, content: ranks that load different batches train on nonsense."""
    content = ""
    if not x.is_floating_point() and x.numel():
        here = x.detach().cpu().contiguous()
        raw = ctypes.string_at(here.data_ptr(), here.numel() * here.element_size())
        content = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return f"{tuple(x.shape)} {x.dtype} {content}"
