"""`Findings`: what the trial of a model found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from seqpar.data import Labels
from seqpar.layout import Mask


@dataclass(frozen=True)
class Findings:
    """What the trial of a model found, which its batches are sharded by.

    Args:
        causal: whether all layers that attend are causal.
        first_position: what the model counts positions from: 0, or as RoBERTa does, 1 after its padding.
        counts_seen: whether positions that it is not given are counted over what attention_mask shows.
        packs: whether positions that start anew are documents to it, on one device.
        labels: which label its own loss compares a row with; `None`: it is no cross entropy of tokens.
        masks: of the layers, without documents, and the size of their chunks; each once.
        numbers: of the modules that attend, in the order in which they do; those that attend once in a call.
    """

    causal: bool
    first_position: int
    counts_seen: bool
    packs: bool
    labels: Labels | None
    masks: tuple[tuple[Mask, int | None], ...]
    numbers: Mapping[nn.Module, int] = field(repr=False)
