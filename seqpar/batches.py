"""The tensors of a batch that are sequences: which they are, and padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.layout import check_whole

SEQUENCES = (
    "input_ids", "inputs_embeds", "labels", "attention_mask", "position_ids", "token_type_ids",
)  # fmt: skip


def sequences_of(
    batch: Mapping[str, Any], whole: Sequence[str], named: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of a batch that are to be sharded: those of known names, and those that are named.

    Raises:
        ValueError, TypeError, NotImplementedError: as `seqpar.shard_batch`.
    """
    counts = Counter([*named, *set(whole), *SEQUENCES])
    again = [n for n in dict.fromkeys(named) if counts[n] > 1]
    if again:
        raise ValueError(
            f"{again} must be named once, in sequences=, shifted= or whole=, and {SEQUENCES} in neither "
            "of the first two"
        )
    missing = [n for n in named if batch.get(n) is None]
    if missing:
        raise ValueError(
            f"the batch must have {missing}, as sequences= or shifted= says, got {list(batch)}"
        )
    tensors = {n: x for n, x in batch.items() if isinstance(x, Tensor) and n not in whole}
    others = [n for n in (*SEQUENCES, *named) if n not in tensors and n not in whole]
    wrong = {n: type(batch[n]).__name__ for n in others if batch.get(n) is not None}
    if wrong:
        raise TypeError(f"sequences must be tensors [b s ...] to be sharded, got {wrong}")
    for name, x in tensors.items():
        check_whole(x, name)
    unknown = [n for n in tensors if n not in SEQUENCES and n not in named]
    if unknown:
        raise ValueError(
            f"is {unknown} a sequence? Name it in sequences= to shard it, in shifted= to shift it as labels "
            f"are, or in whole= to pass it on; only {SEQUENCES} are known"
        )
    lengths = {n: tuple(x.shape[:2]) for n, x in tensors.items()}
    if not tensors or len(set(lengths.values())) != 1 or len(next(iter(lengths.values()))) < 2:
        raise ValueError(
            f"a batch needs sequences that are all [b s ...], got {lengths}; what has no entry for each "
            "token goes in whole="
        )
    mask = tensors.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise NotImplementedError(
            "attention_mask hides tokens and would be ignored; pad on the right with label -100 under "
            "a causal mask, and leave attention_mask out"
        )
    return tensors


def padded(
    tensors: Mapping[str, Tensor], multiple: int, fills: Mapping[str, int]
) -> dict[str, Tensor]:
    """Sequences that go on to a multiple: with a fill, positions with the next ones, others with 0."""
    longer = {}
    for name, x in tensors.items():
        missing = -x.shape[1] % multiple
        fill = x.new_full((x.shape[0], missing, *x.shape[2:]), fills.get(name, 0))
        if name == "position_ids":
            fill += torch.arange(x.shape[1], x.shape[1] + missing, device=x.device)
        longer[name] = torch.cat([x, fill], dim=1)
    return longer
