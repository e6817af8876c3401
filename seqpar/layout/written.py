"""Masks as tensors of integers, for ops that take no objects.

So they are inputs of a compiled graph: another mask compiles nothing anew, while its length is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from seqpar.layout.mask_arguments import ALIGNS
from seqpar.layout.regions import Layers
from seqpar_kernels import Region

if TYPE_CHECKING:
    from seqpar.layout.mask import Mask

LEAST = 64
_SIDES = len(Region._fields)


def written_mask(mask: Mask) -> Int[Tensor, "n"]:
    """A mask as integers: how many there are, what it says, and zeros up to a power of two."""
    parts: list[list[int]] = [
        [int(mask.causal), 0 if mask.align is None else 1 + ALIGNS.index(mask.align)],
        _window(mask),
        _bounds(mask, 0),
        _bounds(mask, 1),
        [] if mask.lengths is None else [*mask.lengths],
    ]
    for regions in mask.regions or ():
        parts.append([*chain.from_iterable(regions)])
    numbers = [0, -1 if mask.regions is None else len(mask.regions)]
    for part in parts:
        numbers += [len(part), *part]
    # Few lengths, so that compilers see few shapes.
    numbers[0] = max(LEAST, 1 << (len(numbers) - 1).bit_length())
    # On the CPU wherever the user has tensors made.
    return torch.tensor(numbers + [0] * (numbers[0] - len(numbers)), device="cpu")


def read_masks(numbers: Int[Tensor, "n"]) -> Iterator[Mask]:
    """Yields the masks that were `written_mask`, one after another."""
    from seqpar.layout.mask import Mask  # it is written when it is made

    rest = numbers.tolist()
    while rest:
        one = iter(rest[1 : rest[0]])
        rest = rest[rest[0] :]
        num_layers = next(one)
        (causal, align), window, of_q, of_k, lengths, *layers = (
            [next(one) for _ in range(next(one))] for _ in range(5 + max(num_layers, 0))
        )
        regions = (tuple(_regions(sides)) for sides in layers)
        # Of documents that are none there is no first boundary either.
        documents = (of_q, of_k) if of_k else of_q
        yield Mask(
            bool(causal),
            (window[0], window[1]) if len(window) == 2 else window[0] if window else None,
            documents or None,
            ALIGNS[align - 1] if align else None,
            None if num_layers < 0 else Layers(regions),
            (lengths[0], lengths[1]) if lengths else None,
        )


def _window(mask: Mask) -> list[int]:
    """The window: nothing, a number of keys, or two sides, of which an open one is -1."""
    if mask.window is None:
        return []
    if isinstance(mask.window, int):
        return [mask.window]
    return [-1 if side is None else side for side in mask.window]


def _bounds(mask: Mask, which: int) -> list[int]:
    """The boundaries of documents; of a pair of them those of queries, or of keys."""
    if mask.pair is not None:
        return [*mask.pair[which]]
    return [] if which or mask.documents is None else [*mask.bounds]


def _regions(numbers: Sequence[int]) -> Iterator[Region]:
    rest = iter(numbers)
    for sides in zip(*(rest,) * _SIDES, strict=True):
        yield Region(*sides)
