"""Masks and layouts as tensors of integers, for ops that take no objects.

So they are inputs of a compiled graph: another one compiles nothing anew, while as many numbers say it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from seqpar.layout.mask_arguments import ALIGNS
from seqpar.layout.regions import Layers
from seqpar.layout.spans import Span
from seqpar_kernels import Region

if TYPE_CHECKING:
    from seqpar.layout.mask import Mask
    from seqpar.layout.shards import Layout

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
    return _filled(numbers)


def written_layout(
    length: int, spans: Sequence[Sequence[tuple[int, int, int]]]
) -> Int[Tensor, "n"]:
    """A layout as integers, as `written_mask` has it.

    Args:
        spans: of each rank, (start, length, step).
    """
    numbers = [0, length, len(spans)]
    for each in spans:
        numbers += [len(each), *chain.from_iterable(each)]
    return _filled(numbers)


def read_layout(numbers: Int[Tensor, "n"], kind: str) -> Layout:
    """The layout that was `written_layout`."""
    return _layout_of(tuple(numbers.tolist()), kind)


@lru_cache(maxsize=256)
def _layout_of(numbers: tuple[int, ...], kind: str) -> Layout:
    from seqpar.layout.shards import Layout  # it is written when it is made

    _, length, size, *rest = numbers
    one = iter(rest)
    spans = [
        tuple(Span(next(one), next(one), next(one)) for _ in range(next(one))) for _ in range(size)
    ]
    return Layout(kind, length, size, tuple(spans))


def _filled(numbers: list[int]) -> Int[Tensor, "n"]:
    """The numbers, of which the first becomes how many there are, with zeros up to a power of two."""
    # Few lengths, so that compilers see few shapes.
    numbers[0] = max(LEAST, 1 << (len(numbers) - 1).bit_length())
    numbers = numbers + [0] * (numbers[0] - len(numbers))
    # On the CPU wherever the user has tensors made.
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, device="cpu")
    # No memory of torch's, which is counted in dry runs and by profilers: it is no activation.
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


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
