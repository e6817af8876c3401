"""`Layout` says which rank holds which positions of a sequence, for any length and any number of ranks.

One object shards, positions, masks and restores; nothing else in the package decides where a token
lives. What is dealt are blocks of `multiple_of` consecutive positions, of which the last may be short:
shards are cut where blocks begin, and the remainder is with the last rows.

Source: zigzag, Zhu 2024, ring-flash-attention; striped, Brandon et al. 2023 (arXiv:2311.09431).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from seqpar.layout.spans import Span, joined
from seqpar_kernels.integers import is_integer

LEAST = 256  # letters


@dataclass(frozen=True)
class Layout:
    """A partition of the positions 0 ... length - 1 over `size` ranks.

    Build one with `contiguous`, `zigzag`, `striped` or `balanced`. Ranks may hold different numbers of
    positions, or none. A rank's rows are its spans, one after the other, in any order; all spans have one
    step, and those without positions are left out.

    Raises:
        ValueError: the spans do not hold every position exactly once, or differ in step.
    """

    kind: str
    length: int
    size: int
    spans: tuple[tuple[Span, ...], ...] = field(repr=False)

    def __post_init__(self) -> None:
        kept = tuple(tuple(span for span in s if span.length != 0) for s in self.spans)
        object.__setattr__(self, "spans", kept)
        spans = [[[span.start, span.length, span.step] for span in s] for s in self.spans]
        object.__setattr__(self, "_code", f"{self.kind}|{[self.length, self.size, spans]}")
        object.__setattr__(self, "_rows", tuple(sum(n for _, n, _ in s) for s in spans))
        object.__setattr__(self, "_hash", hash(self.spans))
        object.__setattr__(self, "_bytes", _bytes_of(self.code))
        if len(self.spans) != self.size:
            raise ValueError(f"a layout for {self.size} ranks needs as many lists of spans")
        for span in (span for s in self.spans for span in s):
            if span.step < 1:
                raise ValueError(f"spans go upwards in steps of at least 1, got {span}")
        # Spans of one step and remainder must follow on one another, from the first to the last position.
        due = {
            span.step: list(range(min(span.step, self.length))) for s in self.spans for span in s
        }
        for span in sorted((span for s in self.spans for span in s), key=lambda span: span.start):
            expected = due[span.step][span.start % span.step]
            if span.length < 1 or span.start != expected or span.positions[-1] >= self.length:
                raise ValueError(
                    f"spans must hold each of {self.length} positions once, got {span}"
                )
            due[span.step][span.start % span.step] = span.positions.stop
        if len(due) > 1 or sum(self.rows) != self.length:
            raise ValueError(f"spans of one step must hold each of {self.length} positions once")

    # docs/design.md: what a model is called with is no dataclass of ours
    @property
    def code(self) -> str:
        """All of it as text: its kind, and numbers as JSON."""
        return self._code  # type: ignore[attr-defined]

    @property
    def code_bytes(self) -> UInt8[Tensor, "n"]:
        """Its `code` as a tensor, for compiled code: an input, so that other layouts compile nothing anew."""
        return self._bytes  # type: ignore[attr-defined]

    @staticmethod
    @lru_cache(maxsize=256)
    def decoded(code: str) -> Layout:
        """The layout of a `code`."""
        kind, _, numbers = code.rpartition("|")
        # Not `ast.literal_eval`, which fails now and then where threads, such as ranks, call it at once.
        length, size, spans = json.loads(numbers)
        return Layout(kind, length, size, tuple(tuple(Span(*x) for x in s) for s in spans))

    @property
    def fingerprint(self) -> int:
        """A number that tells layouts of other spans apart, the same in every process."""
        return self._hash  # type: ignore[attr-defined] # of integers, whose hash is the same everywhere

    def __hash__(self) -> int:
        """Its `fingerprint`, since a hash of as many spans as ranks takes long to make."""
        return self.fingerprint

    @property
    def rows(self) -> tuple[int, ...]:
        """The number of rows that each rank holds."""
        return self._rows  # type: ignore[attr-defined]

    @property
    def step(self) -> int | None:
        """The step of all spans; `None` where there are no positions."""
        return next((span.step for spans in self.spans for span in spans), None)

    def positions(self, rank: int) -> Int[Tensor, "sl"]:
        """The global position of each of the rank's rows, int64, in the order in which it holds them."""
        spans = [torch.arange(s.start, s.positions.stop, s.step) for s in self.spans[rank]]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.long)

    def places(self, rank: int) -> tuple[tuple[slice, slice], ...]:
        """The places of a rank's rows in the whole: (local rows, global rows) of each of its spans."""
        ends = tuple(accumulate((s.length for s in self.spans[rank]), initial=0))
        return tuple(
            (slice(a, b), s.slice)
            for a, b, s in zip(ends[:-1], ends[1:], self.spans[rank], strict=True)
        )

    def is_cut_at(self, multiple: int) -> bool:
        """Whether every rank holds runs of consecutive positions, cut at multiples of `multiple` only.

        The end of the sequence need not be one.

        Raises:
            ValueError: multiple is less than 1.
            TypeError: multiple is not an integer.
        """
        _check(self.length, self.size, multiple)
        return all(
            span.step == 1
            and span.start % multiple == 0
            and (span.positions.stop % multiple == 0 or span.positions.stop == self.length)
            for spans in self.spans
            for span in spans
        )

    @property
    def is_in_order(self) -> bool:
        """Whether each rank holds one run of consecutive positions, or none, in the order of ranks."""
        spans = [s for s in self.spans if s]
        starts = [s[0].start for s in spans]
        return starts == sorted(starts) and all(len(s) == 1 and s[0].step == 1 for s in spans)

    def permutation(self) -> Int[Tensor, "s"]:
        """The positions of rank 0, then of rank 1, ...: `x[permutation]` is x as the ranks hold it."""
        return torch.cat([self.positions(rank) for rank in range(self.size)])

    def inverse(self) -> Int[Tensor, "s"]:
        """The inverse permutation: `y[inverse]` puts the ranks' rows, one after another, in order."""
        permutation = self.permutation()
        inverse = torch.empty_like(permutation)
        inverse[permutation] = torch.arange(len(permutation))
        return inverse


def _bytes_of(code: str) -> UInt8[Tensor, "n"]:
    """A text as a tensor, with blanks up to a power of two, so that compilers see few shapes."""
    text = code.ljust(max(LEAST, 1 << (len(code) - 1).bit_length())).encode()
    if torch.compiler.is_compiling():
        return torch.tensor([*text], dtype=torch.uint8, device="cpu")
    # No memory of torch's, which is counted in dry runs and by profilers: it is no activation.
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def contiguous(length: int, size: int, *, multiple_of: int = 1) -> Layout:
    """Rank r holds the r-th of `size` runs of blocks; the first runs may be one block longer.

    Raises:
        ValueError: length is negative, or size or multiple_of is not positive.
        TypeError: they are not integers.
    """
    runs = _cut(length, size, multiple_of)
    return Layout("contiguous", length, size, tuple(joined([run]) for run in runs))


def zigzag(length: int, size: int, *, multiple_of: int = 1) -> Layout:
    """Rank r holds runs r and 2 * size - 1 - r of 2 * size: equal causal work on every rank.

    Raises:
        ValueError: length is negative, or size or multiple_of is not positive.
        TypeError: they are not integers.
    """
    runs = _cut(length, size, multiple_of, runs_per_rank=2)
    spans = tuple(joined([runs[r], runs[2 * size - 1 - r]]) for r in range(size))
    return Layout("zigzag", length, size, spans)


def striped(length: int, size: int, *, multiple_of: int = 1) -> Layout:
    """Rank r holds blocks r, r + size, r + 2 * size, ...: equal work in every causal tile.

    Blocks of one position are one span with a step, longer ones are as many spans as there are blocks.

    Raises:
        ValueError: length is negative, or size or multiple_of is not positive.
        TypeError: they are not integers.
    """
    _check(length, size, multiple_of)
    if multiple_of == 1:
        counts = [len(range(r, length, size)) for r in range(size)]
        spans = tuple(joined([Span(r, n, size)]) for r, n in enumerate(counts))
    else:
        starts = [range(r * multiple_of, length, size * multiple_of) for r in range(size)]
        spans = tuple(joined(Span(a, min(multiple_of, length - a)) for a in s) for s in starts)
    return Layout("striped", length, size, spans)


def whole(length: int) -> Layout:
    """One rank holds everything."""
    return contiguous(length, 1)


class MakeLayout(Protocol):
    """The signature of every entry of `LAYOUTS`."""

    def __call__(self, length: int, size: int, *, multiple_of: int = 1) -> Layout:
        """The layout of `length` positions over `size` ranks."""
        ...


LAYOUTS: dict[str, MakeLayout] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
}


def _cut(length: int, size: int, multiple_of: int, runs_per_rank: int = 1) -> list[Span]:
    """Cuts a sequence into runs of blocks, in order, whose numbers of blocks differ by at most one."""
    _check(length, size, multiple_of)
    num_runs = size * runs_per_rank
    short, longer = divmod(-(-length // multiple_of), num_runs)
    num_blocks = [short + (i < longer) for i in range(num_runs)]
    ends = [min(n * multiple_of, length) for n in accumulate(num_blocks, initial=0)]
    return [Span(start, stop - start) for start, stop in pairwise(ends)]


def _check(length: int, size: int, multiple_of: int) -> None:
    for number in (length, size, multiple_of):
        if not is_integer(number):
            raise TypeError(f"a layout needs integers, got {length=} {size=} {multiple_of=}")
    if length < 0 or size < 1:
        raise ValueError(f"a layout needs length >= 0 and size >= 1, got {length=} {size=}")
    if multiple_of < 1:
        raise ValueError(f"shards are cut at multiples of a positive number, got {multiple_of=}")
