"""`Mask` says which keys a row may see, once for the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from seqpar.layout.spans import Span
from seqpar_kernels import Band, Documents, Term
from seqpar_kernels.integers import is_integer


@dataclass(frozen=True)
class Mask:
    """Visibility by global position. The default sees everything.

    Args:
        causal: row i sees no column after i.
        window: how many keys back a row sees, itself included; as many ahead when not causal.
            Row i sees column j only if i - window < j (and, not causal, j < i + window).
        documents: boundaries of packed documents, as cumulative lengths 0, ..., length of the sequence (a
            tensor will do, such as the cu_seqlens of flash-attn); a position sees its own document
            only. Equal boundaries are empty documents.

    Raises:
        ValueError: window is less than 1, or documents do not start at 0 or go down.
        TypeError: causal is not a bool, window not an integer, or documents not integers.
    """

    causal: bool = False
    window: int | None = None
    documents: Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be a bool, got {self.causal!r}")
        if self.documents is not None:
            object.__setattr__(self, "documents", Documents(_integers(self.documents)).bounds)
        if self.window is None:
            return
        if not is_integer(self.window):
            raise TypeError(
                f"window must be an integer number of keys or None, got {self.window!r}"
            )
        if self.window < 1:
            raise ValueError(
                f"window must be at least 1 (the row itself), got {self.window}; None means no window"
            )

    def __hash__(self) -> int:
        """The hash of all of it, made once: there may be thousands of documents."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Of integers alone, so that it is the same in another process, which a pickled mask may come to.
        return hash((self.causal, self.window or 0, self.documents or ()))

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
        ahead = 0 if self.causal else None if self.window is None else self.window - 1
        back = None if self.window is None else self.window - 1
        apart = rows.start - cols.start
        return Band(
            lower=None if back is None else -((back - apart) // rows.step),
            upper=None if ahead is None else (apart + ahead) // rows.step,
        )


def _integers(bounds: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Turns integers of NumPy or torch into Python's; leaves all else as it is, to be refused."""
    return tuple(int(b) if hasattr(b, "item") and b == int(b) else b for b in bounds)
