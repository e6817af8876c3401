"""Packed documents: several sequences one after another in one, each of which sees only itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from seqpar.layout import Mask


def packed_documents(position_ids: Int[Tensor, "*b s"]) -> tuple[int, ...]:
    """The boundaries of documents, as cumulative lengths 0, ..., s, for `seqpar.Mask(documents=...)`.

    A document ends where the next position is not the position plus one: where positions restart.
    Call it on the whole sequence, before it is sharded. Padding whose positions are all 0 makes
    documents of one token.

    Args:
        position_ids: of the whole sequence; all sequences of a batch must restart at the same places,
            since a mask is for the whole batch. A batch of one sequence always does.

    Raises:
        ValueError: sequences of the batch restart at different places, or there is none.
        TypeError: position_ids are not integers.
    """
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise TypeError(f"position_ids must be integers, got {position_ids.dtype}")
    if position_ids.ndim == 0 or 0 in position_ids.shape[:-1]:
        raise ValueError(f"position_ids must be [.. s], got {tuple(position_ids.shape)}")
    length = position_ids.shape[-1]
    if length == 0:
        return (0,)
    by_row = [breaks(row) for row in position_ids.reshape(-1, length)]
    if any(row != by_row[0] for row in by_row):
        raise ValueError(
            "all sequences of a batch must have the same documents; pack them into one sequence, "
            f"or attend one at a time, got position_ids {tuple(position_ids.shape)}"
        )
    return (0, *by_row[0], length)


def padded_documents(cu_seqlens: Sequence[int] | Int[Tensor, "n"], length: int) -> tuple[int, ...]:
    """The boundaries of documents in a row that goes on behind the last one, as where it is padded.

    For `seqpar.Mask(documents=...)`. What is behind becomes a document of its own, so that no other one
    sees it. If nothing is behind they are the boundaries as given.

    Args:
        cu_seqlens: the cumulative lengths of the documents, as flash-attn has them. Equal ones are empty
            documents, as where a list of fixed size repeats the last one.
        length: of the whole row, padding included.

    Raises:
        ValueError: cu_seqlens do not go up from 0 to at most `length`, or are of queries and of keys.
        TypeError: they are not integers.
    """
    mask = Mask(documents=cu_seqlens)
    if mask.pair is not None or mask.bounds[-1] > length:
        raise ValueError(f"cu_seqlens must go up from 0 to at most {length}, got {mask.documents}")
    return mask.bounds if mask.bounds[-1] == length else (*mask.bounds, length)


def breaks(positions: Int[Tensor, "s"]) -> list[int]:
    """Where positions do not go up by one."""
    return ((positions.diff() != 1).nonzero().flatten() + 1).tolist()
