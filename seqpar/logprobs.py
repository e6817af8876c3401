"""`token_logprobs`: the log-probabilities of tokens of whole sequences, for losses that compare sequences."""

from __future__ import annotations

from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from seqpar.comm import Group, agreed
from seqpar.data import IGNORE, unshard_sequence
from seqpar.layout import Layout
from seqpar.loss import Reduction, check_sum, gradient_times
from seqpar_kernels import accumulation_dtype


def token_logprobs(
    logits: Float[Tensor, "b sl classes"],
    labels: Int[Tensor, "b sl"],
    layout: Layout,
    group: Group,
    *,
    temperature: float = 1.0,
    gradients: Reduction = "sum",
) -> Float[Tensor, "b s"]:
    """The log-probabilities of the labels of whole sequences, in order, on every rank. All ranks must call.

    For losses that are not a mean over tokens: preferences between answers (DPO), policy gradients (PPO,
    GRPO). All ranks must compute the same loss of it. Logits stay sharded: a number for each token is sent.
    Under "next" labels column i belongs to token i + 1, so `[:, :-1]` are those of the tokens 1 ... s - 1.

    Args:
        labels: shifted, as `seqpar.shard_batch` and `SequenceParallel.shard` give them. Where one is -100 the
            log-probability is 0, and so is its gradient.
        temperature: logits are divided by it.
        gradients: how the ranks' gradients of weights become one, as in `seqpar.mean_loss`: "sum" for
            `seqpar.sum_gradients`, "mean" under DDP and FSDP. With replicas, sums are over replicas too, and
            means are those of the replicas' losses.

    Raises:
        ValueError: labels are not those of logits, or a label is none of the classes, or temperature is not
            positive, or gradients is neither "sum" nor "mean", or not as an open block of
            `seqpar.summed_gradients` has it; and as `seqpar.unshard_sequence`.
        DesyncError: ranks differ in options, or another rank raised.
    """
    with agreed(group, operation="token_logprobs") as claim:
        claim |= {"temperature": temperature, "gradients": gradients}
        if gradients not in get_args(Reduction):
            raise ValueError(f"gradients must be one of {get_args(Reduction)}, got {gradients!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise ValueError(
                f"labels must be [b sl] as logits [b sl classes] are, got {tuple(labels.shape)} for "
                f"{tuple(logits.shape)}"
            )
        if logits.requires_grad and torch.is_grad_enabled():
            check_sum(group, gradients)
        counted = labels[labels != IGNORE]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[2]:
            raise ValueError(
                f"labels must be 0 ... {logits.shape[2] - 1} or {IGNORE}, got {int(counted.min())} ... "
                f"{int(counted.max())}"
            )
    wide = logits.to(accumulation_dtype(logits.dtype)) / temperature
    mine = -F.cross_entropy(wide.mT, labels, reduction="none", ignore_index=IGNORE)
    # Going back, every rank's gradient of the same loss is added up.
    share = mine if gradients == "mean" else gradient_times(mine, 1 / group.size)
    return unshard_sequence(share, layout, group)
