"""Packed documents: several sequences one after another in one, each of which sees only itself."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


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


def breaks(positions: Int[Tensor, "s"]) -> list[int]:
    """Where positions do not go up by one."""
    return ((positions.diff() != 1).nonzero().flatten() + 1).tolist()
