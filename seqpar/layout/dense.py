"""The regions of a dense mask: rows of which each sees what the one above does, moved by a key or not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from jaxtyping import Bool
from torch import Tensor

from seqpar_kernels import FAR, Region

Runs = list[tuple[int, int]]


def regions_of(seen: Bool[Tensor, "i j"]) -> list[Region]:
    """Disjoint regions that show what a tensor of the host does."""
    found: list[Region] = []
    rows = runs_of(seen)
    start, slopes = 0, None
    for row in range(1, len(rows) + 1):
        moved = _moved(rows[row - 1], rows[row]) if row < len(rows) else None
        if moved is not None and slopes in (None, moved):
            slopes = moved
        else:
            found += _regions(start, row, rows[start], slopes)
            start, slopes = row, None
    return found


def runs_of(seen: Bool[Tensor, "i j"]) -> list[Runs]:
    """The runs of keys that each row sees, as (first, last + 1)."""
    outside = seen.new_zeros(len(seen), 1).int()
    edges = seen.int().diff(dim=1, prepend=outside, append=outside)
    rows: list[Runs] = [[] for _ in range(len(seen))]
    (at, first), (_, end) = ((edges == sign).nonzero(as_tuple=True) for sign in (1, -1))
    for row, a, b in zip(at.tolist(), first.tolist(), end.tolist(), strict=True):
        rows[row].append((a, b))
    return rows


def _moved(above: Runs, below: Runs) -> tuple[int, ...] | None:
    """By how much each end of each run moves from a row to the next; `None` if by more than a key."""
    if len(above) != len(below):
        return None
    pairs = zip(chain.from_iterable(above), chain.from_iterable(below), strict=True)
    by = tuple(y - x for x, y in pairs)
    return by if all(x in (0, 1) for x in by) else None


def _regions(start: int, stop: int, runs: Runs, slopes: tuple[int, ...] | None) -> Iterator[Region]:
    slopes = slopes or (0,) * (2 * len(runs))
    for (first, end), left_moves, right_moves in zip(runs, slopes[::2], slopes[1::2], strict=True):
        left, lower = (0, first - start) if left_moves else (first, -FAR)
        right, upper = (FAR, end - 1 - start) if right_moves else (end, FAR)
        yield Region(start, stop, left, right, lower, upper)
