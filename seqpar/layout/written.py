"""Masks as integers, for ops that take no objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from seqpar.layout.mask import ALIGNS, Mask
from seqpar.layout.regions import Layers
from seqpar_kernels import Region

_SIDES = len(Region._fields)


def written_mask(mask: Mask) -> list[int]:
    """A mask as integers. Compilers trace this: it makes no object."""
    parts: list[list[int]] = [
        [int(mask.causal), 0 if mask.align is None else 1 + ALIGNS.index(mask.align)],
        _window(mask),
        _bounds(mask, 0),
        _bounds(mask, 1),
        [] if mask.lengths is None else [*mask.lengths],
    ]
    for regions in mask.regions or ():
        parts.append([*chain.from_iterable(regions)])
    numbers = [-1 if mask.regions is None else len(mask.regions)]
    for part in parts:
        numbers += [len(part), *part]
    return numbers


def read_masks(numbers: Sequence[int]) -> Iterator[Mask]:
    """Yields the masks that were `written_mask`, one after another."""
    rest = iter(numbers)
    for num_layers in rest:
        (causal, align), window, of_q, of_k, lengths, *layers = (
            [next(rest) for _ in range(next(rest))] for _ in range(5 + max(num_layers, 0))
        )
        regions = (tuple(_regions(numbers)) for numbers in layers)
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
