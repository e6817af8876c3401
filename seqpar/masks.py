"""Masks that people have, made of ranges of positions: prefixes, images in text, blocks, trees.

Each function gives a `seqpar.Mask`, and masks are joined by `&`, what both show, and `|`, what either does::

    from seqpar import Mask, masks

    causal = Mask(causal=True)
    causal | masks.keys(0, 100)                       # a prefix of 100 that all see: prefix LM
    causal | masks.spans([(16, 272)])                 # text in which an image sees all of itself
    Mask(causal=True, window=512) | causal & masks.keys(0, 4)     # a window, and the first tokens
    Mask(causal=True, documents=cu_seqlens) & masks.keys(0, 900)  # packed, and padded behind 900

Positions are those of the whole sequence. Where queries are another number than keys they are counted where
`align` has them. What is not a few ranges, such as a dilated window, costs as many walks over keys as a row
sees ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool
from torch import Tensor

from seqpar.layout import Mask
from seqpar.layout.dense import regions_of
from seqpar.layout.regions import layers_of
from seqpar_kernels import FAR, Region
from seqpar_kernels.integers import is_integer
from seqpar_kernels.terms.ranges import check_bounds

Ends = tuple[int, int | None]
CAUSAL = Mask(causal=True)
MOST_LAYERS = 16  # each is a walk over the keys; a function is asked of every score


def rectangle(rows: Ends = (0, None), cols: Ends = (0, None)) -> Mask:
    """Rows rows[0] to rows[1] - 1 see the keys cols[0] to cols[1] - 1; `None` is the end.

    Raises:
        ValueError: an end is negative, or lies before its beginning.
        TypeError: they are not integers.
    """
    return _of([_region(rows, cols)])


def band(lower: int | None = None, upper: int | None = None) -> Mask:
    """Row i sees key j if lower <= j - i <= upper, where `None` is no bound; both may be negative.

    `Mask(causal=True)` is `band(upper=0)`, and `band(upper=-1)` leaves out the row's own key.

    Raises:
        TypeError: a bound is no integer.
    """
    for name, value in (("lower", lower), ("upper", upper)):
        if value is not None and not is_integer(value):
            raise TypeError(f"{name} must be an integer or None, got {value!r}")
    low, high = -FAR if lower is None else lower, FAR if upper is None else upper
    return _of([Region(lower=low, upper=high)])


def keys(start: int, stop: int | None = None) -> Mask:
    """All rows see the keys from `start` to `stop` - 1, as where others are padding.

    Raises:
        ValueError, TypeError: as `rectangle`.
    """
    return rectangle(cols=(start, stop))


def key_runs(runs: Iterable[Ends]) -> Mask:
    """All rows see the keys of each run (start, stop).

    Raises:
        ValueError, TypeError: as `rectangle`.
    """
    return _of([_region((0, None), run) for run in runs])


def spans(spans: Iterable[tuple[int, int]]) -> Mask:
    """The positions of each span (start, stop) see each other, as those of an image in text.

    Raises:
        ValueError, TypeError: as `rectangle`.
    """
    return _of([_region(span, span) for span in spans])


def prefix_lm(prefix: int | Sequence[int], documents: Sequence[int] | None = None) -> Mask:
    """Causal, but that all see the prefix, which so sees all of itself; inside documents, each one its own.

    Args:
        prefix: its length; of packed documents one for each.
        documents: their boundaries, as in `Mask`.

    Raises:
        ValueError: there is not one prefix for each document, or one is negative.
        TypeError: they are not integers.
    """
    if documents is None:
        return CAUSAL | keys(0, _integer("prefix", prefix))
    packed = Mask(documents=documents)
    lengths = list(prefix) if isinstance(prefix, Sequence) else [prefix] * (len(packed.bounds) - 1)
    if len(lengths) != len(packed.bounds) - 1:
        raise ValueError(
            f"there must be a prefix for each of the {len(packed.bounds) - 1} documents, got {lengths}"
        )
    prefixes = []
    for length, (start, stop) in zip(lengths, pairwise(packed.bounds), strict=True):
        end = min(start + _integer("prefix", length), stop)
        prefixes.append(_region((start, stop), (start, end)))
    return (CAUSAL & packed) | _of(prefixes)


def block_causal(bounds: Sequence[int], *, back: int | None = None, ahead: int = 0) -> Mask:
    """Each row sees all keys of its own block and of blocks before it, as in video or block diffusion.

    Args:
        bounds: of the blocks, as cumulative lengths 0, ..., length; see `every`.
        back: how many blocks before its own a row sees; `None` is all.
        ahead: how many after its own, as speech that is recognised with some delay.

    Raises:
        ValueError: the boundaries do not start at 0 or go down, or a number of blocks is negative.
        TypeError: they are not integers.
    """
    check_bounds("blocks", bounds)
    num = len(bounds) - 1
    back = num if back is None else _integer("back", back)
    ahead = _integer("ahead", ahead)
    regions = []
    for n, (start, stop) in enumerate(pairwise(bounds)):
        seen = bounds[max(0, n - back)], bounds[min(num, n + 1 + ahead)]
        regions.append(_region((start, stop), seen))
    return _of(regions, length=bounds[-1])


def every(size: int, length: int) -> tuple[int, ...]:
    """The boundaries of blocks of one size, the last of which may be shorter: 0, size, ..., length.

    `Mask(documents=every(...))` is chunked attention, as in Llama 4.

    Raises:
        ValueError: the size is not positive, or the length negative.
        TypeError: they are not integers.
    """
    if _integer("size", size) == 0:
        raise ValueError("size must be at least 1")
    return (*range(0, _integer("length", length), size), length)


def global_tokens(spans: Iterable[tuple[int, int]]) -> Mask:
    """The positions of spans (start, stop) see all, and all see them, as beside the window of Longformer.

    Source: Beltagy et al. 2020 (arXiv:2004.05150), section 3.1.

    Raises:
        ValueError, TypeError: as `rectangle`.
    """
    ends = list(spans)
    seen = [_region((0, None), span) for span in ends]
    return _of([*seen, *(_region(span, (0, None)) for span in ends)])


def shared_prompt(prompt: int, answers: Sequence[int]) -> Mask:
    """One prompt and several answers to it: each is causal, sees the prompt, and none of the others.

    Args:
        prompt: its length.
        answers: the length of each, in the order in which they follow.

    Raises:
        ValueError: a length is negative.
        TypeError: they are not integers.
    """
    return tree([prompt, *answers], [None, *(0 for _ in answers)])


def tree(lengths: Sequence[int], parents: Sequence[int | None]) -> Mask:
    """Segments of text that branch: each is causal, and sees the segments on its way to the root.

    Args:
        lengths: of each segment, in the order in which they follow.
        parents: which segment each of them goes on from, one before it; `None` for a root.

    Raises:
        ValueError: a length is negative, there is not one parent for each, or one is not before its child, as
            in a cycle.
        TypeError: they are not integers.
    """
    if len(lengths) != len(parents):
        raise ValueError(
            f"there must be a parent for each of the {len(lengths)} segments, got {parents}"
        )
    bounds = tuple(accumulate((_integer("a length", x) for x in lengths), initial=0))
    regions: list[Region] = []
    ways: list[list[int]] = []
    for n, parent in enumerate(parents):
        if parent is not None and not 0 <= _integer("a parent", parent) < n:
            raise ValueError(f"a segment goes on from one before it, got {parent} for segment {n}")
        way = [] if parent is None else ways[parent]
        ways.append([*way, n])
        regions += (
            _region((bounds[n], bounds[n + 1]), (bounds[m], bounds[m + 1])) for m in ways[n]
        )
    mask = _of(regions, length=bounds[-1])
    return mask & CAUSAL


def dense(seen: Bool[Tensor, "i j"]) -> Mask:
    """What a boolean tensor shows, True where row i sees key j; it is looked at, which waits for a GPU.

    Ranges are found in it. Where rows see so many that there would be more than `MOST_LAYERS` layers, the
    tensor is kept and asked score by score, as a `mask_mod`.

    Raises:
        ValueError: it is not 2-D.
        TypeError: it is not a boolean tensor.
    """
    if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
        raise TypeError(f"seen must be a boolean tensor, got {seen!r}")
    if seen.ndim != 2:
        raise ValueError(f"seen must be [i j], got {tuple(seen.shape)}")
    num_rows, num_cols = seen.shape
    regions = regions_of(seen.cpu())
    if len(regions) <= MOST_LAYERS * max(num_rows, 1):
        layers = layers_of(regions)
        if len(layers) <= MOST_LAYERS:
            return Mask(align="top-left", regions=layers, lengths=(num_rows, num_cols))
    lengths = num_rows, num_cols
    return Mask(align="top-left", lengths=lengths, mask_mod=Table(seen.clone()))


@dataclass(frozen=True, eq=False)
class Table:
    """A `mask_mod` that looks up `[i j]`, or `[b h i j]`."""

    shown: Bool[Tensor, "*b i j"]

    def __call__(self, batch: Tensor, head: Tensor, row: Tensor, col: Tensor) -> Tensor:
        """Whether the score is visible."""
        return self.shown[row, col] if self.shown.ndim == 2 else self.shown[batch, head, row, col]


def _of(regions: Sequence[Region], length: int | None = None) -> Mask:
    """The mask that shows some regions, which may overlap."""
    return Mask(regions=layers_of(regions), lengths=None if length is None else (length, length))


def _region(rows: Ends, cols: Ends) -> Region:
    (top, bottom), (left, right) = (_ends(x) for x in (rows, cols))
    return Region(top, bottom, left, right)


def _ends(ends: Ends) -> tuple[int, int]:
    start, stop = ends
    start = _integer("a start", start)
    stop = FAR if stop is None else _integer("a stop", stop)
    if stop < start:
        raise ValueError(f"a range must not end before it begins, got {ends}")
    return start, stop


def _integer(name: str, value: object) -> int:
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)  # type: ignore[call-overload]
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return number
