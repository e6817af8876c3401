"""`Mask` says which keys a row may see, once for the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

from torch import Tensor

from seqpar.layout.spans import Span
from seqpar_kernels import Band, Documents, Term
from seqpar_kernels.integers import is_integer

Align = Literal["top-left", "bottom-right"]
ALIGNS: tuple[Align, ...] = get_args(Align)


@dataclass(frozen=True)
class Mask:
    """Visibility by global position. The default sees everything.

    Args:
        causal: row i sees no column after i.
        window: how many keys back a row sees, itself included; as many ahead when not causal.
            Row i sees column j only if i - window < j (and, not causal, j < i + window). Or (left, right), as
            flash-attn has it: how many keys before the row it sees, and how many after it; None or -1 is
            all of them. Row i sees column j only if i - left <= j <= i + right.
        documents: boundaries of packed documents, as cumulative lengths 0, ..., length of the sequence (a
            tensor will do, such as the cu_seqlens of flash-attn); a position sees its own document
            only. Equal boundaries are empty documents.
        align: where rows stand over keys that are another number. "top-left": row 0 over key 0, as torch's
            is_causal=True. "bottom-right": the last row over the last key, as flash-attn from 2.1 on, and as
            in a cache. What is causal, has a window or ALiBi must say it then; else it says nothing.

    Raises:
        ValueError: window is less than 1, or a side of it negative, documents do not start at 0 or go down,
            or align is neither.
        TypeError: causal is not a bool, window not an integer or two, or documents not integers.
    """

    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    documents: Sequence[int] | Tensor | None = None
    align: Align | None = None
    # How far rows, and how far keys, are from where they are counted: `aligned` knows.
    shift: tuple[int, int] = field(default=(0, 0), repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be a bool, got {self.causal!r}")
        if self.documents is not None:
            object.__setattr__(self, "documents", Documents(_integers(self.documents)).bounds)
        if self.align is not None and self.align not in ALIGNS:
            raise ValueError(f"align must be one of {ALIGNS} or None, got {self.align!r}")
        object.__setattr__(self, "window", _checked_window(self.window))

    def __hash__(self) -> int:
        """The hash of all of it, made once: there may be thousands of documents."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Of integers alone, so that it is the same in another process, which a pickled mask may come to.
        align = 0 if self.align is None else 1 + ALIGNS.index(self.align)
        sides = tuple(-1 if side is None else side for side in self.sides)
        return hash((self.causal, sides, self.documents or (), align, self.shift))

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """How many keys before a row it sees, and how many after it; `None` where the mask says nothing."""
        if isinstance(self.window, tuple):
            left, right = self.window
        else:
            left = right = None if self.window is None else self.window - 1
        return left, 0 if self.causal else right

    @property
    def has_diagonal(self) -> bool:
        """Whether what a row sees depends on where it stands over the keys."""
        return self.sides != (None, None)

    def aligned(self, num_rows: int, num_cols: int, *, positions: bool = False) -> Mask:
        """The mask for sequences of these lengths: it knows where rows stand over keys.

        Args:
            positions: whether a score depends on them, as with ALiBi.

        Raises:
            ValueError: it matters where they stand, and the mask does not say.
        """
        if num_rows == num_cols or not (self.has_diagonal or positions):
            return self if self.shift == (0, 0) else replace(self, shift=(0, 0))
        if self.align is None:
            raise ValueError(
                f"there are {num_rows} query and {num_cols} key positions: say where the rows of a causal "
                "mask, a window or ALiBi stand. Mask(align='top-left') has row 0 over key 0, "
                "align='bottom-right' the last row over the last key"
            )
        # Both end at the same position, or both begin there: no position is negative.
        apart = num_cols - num_rows if self.align == "bottom-right" else 0
        return replace(self, shift=(max(apart, 0), max(-apart, 0)))

    @property
    def bounds(self) -> tuple[int, ...]:
        """The boundaries of documents; (0,) where there is one document and no boundary."""
        return (0,) if self.documents is None else tuple(self.documents)

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """What hides scores besides the band, as kernels take it."""
        return () if self.documents is None else (Documents(self.bounds),)

    def band(self, rows: Span, cols: Span) -> Band:
        """The band that the positions of `rows` see of the positions of `cols`, both of the same step.

        Row i is position r + i * step, column j is c + j * step; dividing position bounds by the step
        rounds towards the inside of the mask.
        """
        assert rows.step == cols.step, "a layout has one step"
        back, ahead = self.sides
        apart = rows.start + self.shift[0] - cols.start - self.shift[1]
        return Band(
            lower=None if back is None else -((back - apart) // rows.step),
            upper=None if ahead is None else (apart + ahead) // rows.step,
        )


def _checked_window(window: object) -> int | tuple[int | None, int | None] | None:
    """The window with `None` for open sides; of two open sides nothing is left."""
    if window is None:
        return None
    if isinstance(window, (tuple, list)) and len(window) == 2:
        sides = []
        for side in window:
            if side is not None and not is_integer(side):
                raise TypeError(f"the sides of a window must be integers or None, got {window!r}")
            if side is not None and side < -1:
                raise ValueError(
                    f"a side of a window must be 0 or more keys, or None or -1 for all, got {window!r}"
                )
            sides.append(None if side is None or side == -1 else int(side))
        left, right = sides
        return None if left is None and right is None else (left, right)
    if not isinstance(window, int) or isinstance(window, bool):
        raise TypeError(
            f"window must be an integer number of keys, a pair (left, right) or None, got {window!r}"
        )
    if window < 1:
        raise ValueError(
            f"window must be at least 1 (the row itself), got {window}; None means no window"
        )
    return window


def _integers(bounds: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Turns integers of NumPy or torch into Python's; leaves all else as it is, to be refused."""
    return tuple(int(b) if hasattr(b, "item") and b == int(b) else b for b in bounds)
