"""The loss of logits that are sharded by vocabulary, which no rank ever holds whole.

torch's loss_parallel computes the same, but is switched on for the whole process until backward is over, and
takes DTensors, where models give plain tensors.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqpar.comm import Group, agreed, all_reduce
from seqpar_kernels import accumulation_dtype


def vocabulary_cross_entropy(
    logits: Float[Tensor, "*tokens vl"],
    labels: Int[Tensor, "*tokens"],
    group: Group,
    *,
    vocabulary: int,
    ignore_index: int = -100,
) -> Float[Tensor, "*tokens"]:
    """The cross entropy of every token, the same on every rank. All ranks must call.

    Not reduced, so that `seqpar.mean_loss` can take the mean over other ranks, which hold other tokens. In
    float32 or wider. Backward communicates nothing.

    Args:
        logits: this rank's part of the vocabulary, as a policy with `logits="sharded"` leaves it: in order of
            ranks, each but the last ones of vocabulary / P, rounded up.
        labels: of the same tokens on every rank, in the whole vocabulary.
        vocabulary: how many classes all ranks hold together.
        ignore_index: tokens with this label have loss 0.

    Raises:
        ValueError: logits are not this rank's part, shapes differ, or a label is neither in the vocabulary
            nor ignore_index.
        TypeError: logits are no floating-point numbers.
        DesyncError: ranks differ in shapes, types or labels, or another rank raised.
    """
    with agreed(group, operation="vocabulary_cross_entropy") as claim:
        claim |= {"tokens": tuple(labels.shape), "dtype": logits.dtype, "vocabulary": vocabulary}
        start, stop = vocabulary_range(vocabulary, group.rank, group.size)
        is_valid = labels != ignore_index
        claim["labels"] = _check(logits, labels, stop - start, vocabulary, is_valid)
    x = logits.to(accumulation_dtype(logits.dtype))
    peak = x.detach().amax(-1)
    group.all_reduce_(peak, "max")
    is_mine = is_valid & (labels >= start) & (labels < stop)
    target = x.gather(-1, (labels - start).masked_fill(~is_mine, 0)[..., None])[..., 0]
    parts = (x - peak[..., None]).exp().sum(-1), target.masked_fill(~is_mine, 0.0)
    total, target = all_reduce(torch.stack(parts), group)
    return (total.log() + peak - target).masked_fill(~is_valid, 0.0)


def vocabulary_range(vocabulary: int, rank: int, size: int) -> tuple[int, int]:
    """The classes start ... stop - 1 of a rank, as torch.chunk and DTensor deal them.

    Raises:
        ValueError: some rank would have none.
    """
    each = -(-vocabulary // size)
    if vocabulary < 1 or each * (size - 1) >= vocabulary:
        raise ValueError(
            f"a vocabulary of {vocabulary} leaves some of {size} ranks without a class, at {each} for each; "
            "take fewer ranks"
        )
    return rank * each, min((rank + 1) * each, vocabulary)


def _check(
    logits: Tensor, labels: Tensor, classes: int, vocabulary: int, is_valid: Tensor
) -> tuple[int, int]:
    """What the labels of all ranks have in common: their sum and how many count."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point numbers, got {logits.dtype}")
    if logits.shape != (*labels.shape, classes):
        raise ValueError(
            f"this rank's logits must be {(*labels.shape, classes)} for labels {tuple(labels.shape)} and "
            f"{classes} of {vocabulary} classes, got {tuple(logits.shape)}; a policy with logits='sharded' "
            "gives them"
        )
    is_wrong = is_valid & ((labels < 0) | (labels >= vocabulary))
    if is_wrong.any():
        raise ValueError(
            f"labels must be 0 ... {vocabulary - 1} or ignore_index, got {int(labels[is_wrong][0])}"
        )
    return int(labels.sum()), int(is_valid.sum())
