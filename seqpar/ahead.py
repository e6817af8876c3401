"""What rows find further on: labels and tokens that lie some way ahead, of the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from seqpar.layout import Mask
from seqpar_kernels.transfer import on_device


def tokens_ahead(
    x: Shaped[Tensor, "b s *rest"], by: range, ends: Int[Tensor, "#b #s"], fill: int
) -> Shaped[Tensor, "n b s *rest"]:
    """For each n of `by`, what x has n rows further on, and `fill` where that is not before the row's end."""
    length = x.shape[1]
    source = torch.arange(by.start, by.stop)[:, None] + torch.arange(length)
    there = (source < ends[:, None]).view(len(ends), *source.shape, *[1] * (x.ndim - 2))
    moved = x[:, on_device(source.clamp(max=length - 1), x.device)]
    return moved.masked_fill(on_device(~there, x.device), fill).movedim(1, 0)


def ends_of_documents(
    mask: Mask | Sequence[Mask] | None, length: int, num_sequences: int
) -> Int[Tensor, "#b s"]:
    """Where the document of each row ends, for all sequences of a batch or for each.

    Raises:
        ValueError: there are no documents, or they do not end where the sequence does, or the masks are
            another number than the sequences.
    """
    masks = [mask] if mask is None or isinstance(mask, Mask) else list(mask)
    if len(masks) not in (1, num_sequences):
        raise ValueError(f"{num_sequences} sequences need as many masks, or one, got {len(masks)}")
    return torch.stack([_ends(each, length) for each in masks])


def _ends(mask: Mask | None, length: int) -> Int[Tensor, "s"]:
    if mask is None or mask.documents is None or mask.pair is not None:
        raise ValueError(
            "labels='next_in_document' asks for the documents, in mask=seqpar.Mask(documents=...)"
        )
    if mask.bounds[-1] != length:
        raise ValueError(
            f"documents must end where the sequence does, at {length}, got {mask}; "
            "seqpar.padded_documents makes a document of padding behind them"
        )
    bounds = torch.tensor(mask.bounds)
    return bounds[1:].repeat_interleave(bounds.diff())
