"""Which tokens of a batch belong together: padding masks, packed positions and cu_seq_lens as documents.

Decided from the whole batch, before it is sharded, by the rules that transformers has for one device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from seqpar.data import IGNORE
from seqpar.integrations.transformers.internals import chunks_begin_with_documents
from seqpar.layout import Mask
from seqpar.layout.dense import runs_of
from seqpar.masks import key_runs
from seqpar.packing import breaks, padded_documents

Bounds = tuple[int, ...]
CU_SEQ_LENS = ("cu_seq_lens_q", "cu_seq_lens_k")
PACKED = (*CU_SEQ_LENS, "max_length_q", "max_length_k")  # for flash attention; read, not passed on


@dataclass(frozen=True)
class Shown:
    """The runs of tokens that an attention_mask shows of a row, where it hides some between others."""

    runs: tuple[tuple[int, int], ...]


class Padded(Bounds):
    """The boundaries of what an attention_mask hides before and after a text, and of the text."""


# What tokens of a row may meet: the boundaries of its documents, what is shown of it, or all.
Row = Bounds | Shown | None


def masked(
    mask: Mask,
    rows: tuple[Row, ...],
    length: int,
    chunk: int | None = None,
    blocks: Sequence[Mask | None] = (),
) -> Mask | tuple[Mask, ...]:
    """A mask with what tokens of a row may meet besides: one, or one for each row of the batch.

    Args:
        length: of the rows.
        chunk: of how many tokens chunks are, where tokens meet those of their own only.
        blocks: what tokens of each row of the batch see beside the mask, in their document.
    """
    num_rows = len(blocks) or len(rows)
    rows = rows if len(rows) == num_rows else rows * num_rows
    each = tuple(zip(rows, blocks or [None] * num_rows, strict=True))
    made = {row: _masked(mask, *row, length, chunk) for row in dict.fromkeys(each)}
    return made[each[0]] if len(made) == 1 else tuple(made[row] for row in each)


def _masked(mask: Mask, row: Row, block: Mask | None, length: int, chunk: int | None) -> Mask:
    document = row if isinstance(row, tuple) else None
    bounds = document if chunk is None else _chunks(row, length, chunk)
    mask = mask if bounds is None else replace(mask, documents=bounds)
    if block is not None:
        mask |= block if document is None else block & Mask(documents=document)
    return mask & key_runs(row.runs) if isinstance(row, Shown) else mask


def _chunks(row: Row, length: int, chunk: int) -> Bounds:
    """The boundaries of the documents of a row and of chunks in them."""
    if isinstance(row, Shown):
        row = Padded((0, row.runs[0][0], length))
    starts = (0, *(row or ()))
    # Every release counts chunks from behind padding, and the newer ones from where each packed text begins.
    if not isinstance(row, Padded) and not chunks_begin_with_documents():
        return tuple(sorted({*starts, *range(0, length, chunk), length}))
    ends = pairwise(sorted({*starts, length}))
    return tuple(sorted({x for a, b in ends for x in (*range(a, b, chunk), b)} | {0}))


def documents_of(
    batch: Mapping[str, Any], shape: tuple[int, int], *, causal: bool, packs: bool = True
) -> list[Row]:
    """What the tokens of every row of a batch may meet.

    As transformers does: `cu_seq_lens_q` says them, and what is behind the last is padding, a document of its
    own; positions that do not go up by one start a new one where there is no attention_mask; and what an
    attention_mask hides is a document of its own, so that hidden and seen tokens do not meet. Under a
    causal mask what is hidden at the end needs none. Tokens that it hides between others are hidden from all.

    Args:
        batch: with the tensors of the whole batch, if any: attention_mask, position_ids and labels `[b s]`,
            cu_seq_lens_q and cu_seq_lens_k `[documents + 1]`.
        shape: of the batch, (b, s).
        causal: whether the model's layers are.
        packs: whether the model takes positions that start anew for documents.

    Raises:
        ValueError: they contradict each other, or do not fit the shape, or padding behind cu_seq_lens_q has
            labels.
        NotImplementedError: the mask is not `[b s]`, or positions start anew in a model that is not causal or
            does not look at them.
    """
    mask = seen_tokens(batch.get("attention_mask"), shape)
    breaks = _position_breaks(batch.get("position_ids"), shape)
    packed = _packed_bounds(batch, shape)
    if packed is not None:
        end = packed[-1]
        if mask is not None and not bool(mask[:, :end].all()):
            raise ValueError(
                "cu_seq_lens_q and an attention_mask that hides tokens of its documents contradict each other"
            )
        extra = sorted({b for row in breaks for b in row if b < end} - set(packed))
        if extra:
            raise ValueError(
                f"position_ids start anew at {extra}, where cu_seq_lens_q has no document"
            )
        _check_no_label(batch.get("labels"), end)
        return [padded_documents(packed, shape[1])] * shape[0]
    if mask is not None:
        return [
            _padded_row(row, seen, breaks[row], causal=causal)
            for row, seen in enumerate(mask.cpu())
        ]
    if not causal and any(breaks):
        raise NotImplementedError(
            "position_ids start anew, but this model is not causal, and transformers itself then attends "
            "over all documents or not, depending on the implementation; say cu_seq_lens_q and cu_seq_lens_k"
        )
    if not packs and any(breaks):
        raise NotImplementedError(
            "position_ids start anew, but this model makes its masks without them, so that transformers "
            "itself attends over all documents or not, depending on the implementation; say cu_seq_lens_q "
            "and cu_seq_lens_k"
        )
    return [(0, *row, shape[1]) if row else None for row in breaks]


def seen_tokens(mask: Any, shape: tuple[int, int]) -> Bool[Tensor, "b s"] | None:
    """The attention_mask of a batch as booleans.

    Raises:
        ValueError: it has another shape or holds other values than 0 and 1.
        NotImplementedError: it is not two-dimensional.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        what = f"{mask.ndim}-D" if isinstance(mask, Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask must be [b s] of zeros and ones, got {what}; a mask of rows and keys would have "
            "to be sharded twice: say documents with cu_seq_lens_q or position_ids instead"
        )
    if tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask must be {shape} like the tokens, got {tuple(mask.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must hold zeros and ones")
    return mask.bool()


def _padded_row(row: int, seen: Bool[Tensor, "s"], breaks: list[int], *, causal: bool) -> Row:
    length, count = len(seen), int(seen.sum())
    first, end = (int(x.int().argmax()) for x in (seen, seen.flip(0)))
    inside = [b for b in breaks if count and first < b < length - end]
    if inside:
        raise ValueError(
            f"position_ids of row {row} start anew at {inside}, while attention_mask says one document; "
            "leave attention_mask out if the row is packed"
        )
    if not bool(seen[first : first + count].all()):
        return Shown(tuple(runs_of(seen[None])[0]))
    if count in (0, length) or (causal and first == 0):
        return None
    return Padded(sorted({0, first, first + count, length}))


def _position_breaks(positions: Any, shape: tuple[int, int]) -> list[list[int]]:
    """Where the positions of each row do not go up by one."""
    if positions is None:
        return [[] for _ in range(shape[0])]
    if tuple(positions.shape) != shape:
        raise ValueError(
            f"position_ids must be {shape} like the tokens, got {tuple(positions.shape)}"
        )
    return [breaks(row) for row in positions.cpu()]


def _packed_bounds(batch: Mapping[str, Any], shape: tuple[int, int]) -> Bounds | None:
    bounds = {name: _integers(batch[name]) for name in CU_SEQ_LENS if batch.get(name) is not None}
    if not bounds:
        return None
    if shape[0] != 1 or len(set(bounds.values())) != 1:
        raise ValueError(
            f"cu_seq_lens_q and cu_seq_lens_k must be the same, of a batch of 1, got {bounds} for {shape}"
        )
    (packed,) = set(bounds.values())
    if packed[0] != 0 or packed[-1] > shape[1] or any(a > b for a, b in pairwise(packed)):
        raise ValueError(
            f"cu_seq_lens_q must go up from 0 to {shape[1]}, or less where padding follows, got {packed}"
        )
    return packed


def _check_no_label(labels: Any, end: int) -> None:
    """Refuses labels that count behind the last document: what they are there is padding."""
    if isinstance(labels, Tensor) and labels.ndim > 1 and bool((labels[:, end:] != IGNORE).any()):
        raise ValueError(
            f"cu_seq_lens_q ends at {end}, so what follows is padding, and its labels must be {IGNORE}"
        )


def _integers(bounds: Int[Tensor, "n"]) -> Bounds:
    return tuple(int(b) for b in bounds)
