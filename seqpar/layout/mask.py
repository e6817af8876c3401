"""`Mask` says which keys a row may see, once for the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from seqpar.layout.mask_arguments import (
    ALIGNS,
    Align,
    Bounds,
    Window,
    checked_documents,
    checked_layers,
    checked_window,
)
from seqpar.layout.placement import common_place, shift_of
from seqpar.layout.regions import Layers, both, either
from seqpar.layout.spans import Span
from seqpar.layout.written import written_mask
from seqpar_kernels import FAR, Layer, MaskMod, Place, Ranges, Region, Term
from seqpar_kernels.dense import Seen
from seqpar_kernels.terms.modifiers import Modifier, as_it_is, both_show, described

FULL, CAUSAL = (Layer(),), (Layer(upper=0),)


@dataclass(frozen=True, repr=False)
class Mask:
    """Visibility by global position. The default sees everything.

    Masks are joined by `&`, what both show, and `|`, what either does. `seqpar.masks` makes more of them, as
    prefixes and blocks, and `draw` shows one.

    Args:
        causal: row i sees no column after i.
        window: how many keys back a row sees, itself included; as many ahead when not causal.
            Row i sees column j only if i - window < j (and, not causal, j < i + window). Or (left, right), as
            flash-attn has it: how many keys before the row it sees, and how many after it; None or -1 is
            all of them. Row i sees column j only if i - left <= j <= i + right.
        documents: boundaries of packed documents, as cumulative lengths 0, ..., length of the sequence (a
            tensor will do, such as the cu_seqlens of flash-attn); a position sees its own document
            only. Equal boundaries are empty documents. Where keys are another sequence: a pair, the
            boundaries of queries and those of keys; then rows of document n see the keys of document n, and
            stand over them as `align` says.
        align: where rows stand over keys that are another number. "top-left": row 0 over key 0, as torch's
            is_causal=True. "bottom-right": the last row over the last key, as flash-attn from 2.1 on, and as
            in a cache. What is causal, has a window or ALiBi must say it then; else it says nothing.
        regions: what `&` and `|` have made of masks; see `seqpar.masks`. It stands alone, but for `align`.
        lengths: of queries and of keys, where the mask is for these alone, as documents are.
        mask_mod: a function as FlexAttention takes it, (batch, head, row, column) -> whether visible, of
            0-dimensional tensors on global positions, which are counted where `align` has them. Of what the
            rest of the mask shows it shows less. What it holds is looked up when the mask is made. Only
            `reference` and stored scores ask it.

    Raises:
        ValueError: window is less than 1, or a side of it negative, documents do not start at 0, go down, or
            are not as many of queries as of keys, align is neither, or regions are no layers.
        TypeError: causal is not a bool, window not an integer or two, or documents not integers.
    """

    causal: bool = False
    window: Window = None
    documents: (
        Sequence[int] | Tensor | tuple[Sequence[int] | Tensor, Sequence[int] | Tensor] | None
    ) = None
    align: Align | None = None
    regions: Layers | None = None
    lengths: tuple[int, int] | None = None
    mask_mod: Modifier | None = None
    # The same as integers, for ops, which take no objects.
    numbers: Tensor = field(init=False, repr=False, compare=False)
    # How far rows, and how far keys, are from where they are counted: `aligned` knows.
    shift: tuple[int, int] = field(default=(0, 0), repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise TypeError(f"causal must be a bool, got {self.causal!r}")
        if self.documents is not None:
            object.__setattr__(self, "documents", checked_documents(self.documents))
        if self.mask_mod is not None and not callable(self.mask_mod):
            raise TypeError(f"mask_mod must be a function or None, got {self.mask_mod!r}")
        if self.mask_mod is not None:
            object.__setattr__(self, "mask_mod", as_it_is(self.mask_mod))
        if self.align is not None and self.align not in ALIGNS:
            raise ValueError(f"align must be one of {ALIGNS} or None, got {self.align!r}")
        object.__setattr__(self, "window", checked_window(self.window))
        if self.documents is not None:
            ends = self.pair or (self.bounds, self.bounds)
            object.__setattr__(self, "lengths", tuple(bounds[-1] for bounds in ends))
        if self.regions is not None and not isinstance(self.regions, Layers):
            object.__setattr__(self, "regions", checked_layers(self.regions))
        if self.regions is not None and (self.causal, self.window, self.documents) != (
            False,
            None,
            None,
        ):
            raise ValueError("regions are all of a mask: join it with others by & and |")
        # Made at once, since compilers would take what is made later for constants.
        object.__setattr__(self, "numbers", written_mask(self))

    def __repr__(self) -> str:
        """What it says; what it leaves open is left out."""
        # Of documents the lengths follow.
        names = [
            f for f in fields(self) if f.repr and (f.name != "lengths" or self.documents is None)
        ]
        said = (
            (f.name, getattr(self, f.name)) for f in names if getattr(self, f.name) != f.default
        )
        # A function by its code, not by its address: ranks compare the text.
        parts = (f"{name}={described(x) if callable(x) else repr(x)}" for name, x in said)
        return f"Mask({', '.join(parts)})"

    def __hash__(self) -> int:
        """The hash of all of it, made once: there may be thousands of documents."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Of integers alone, so that it is the same in another process, which a pickled mask may come to.
        align = 0 if self.align is None else 1 + ALIGNS.index(self.align)
        sides = tuple(-1 if side is None else side for side in self.sides)
        lengths = self.lengths or ()
        return hash(
            (
                self.causal,
                sides,
                self.documents or (),
                align,
                self.regions or (),
                lengths,
                self.shift,
            )
        )

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """How many keys before a row it sees, and how many after it; `None` where the mask says nothing."""
        if isinstance(self.window, tuple):
            left, right = self.window
        else:
            left = right = None if self.window is None else self.window - 1
        return left, 0 if self.causal else right

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """What the mask shows, as kernels walk it: rows and columns by position, no score twice."""
        # docs/design.md: a mask is a few layers
        if self.regions is not None:
            return tuple(map(Layer.of, self.regions))
        back, ahead = self.sides
        lower, upper = -FAR if back is None else -back, FAR if ahead is None else ahead
        if self.documents is None:
            return (Layer(lower, upper),)
        if self.pair is None:
            return (Layer(lower, upper, Ranges.documents(self.bounds)),)
        found = [region for region in self._crossed(*self.pair, lower, upper) if region is not None]
        return (Layer.of(found),) if found else ()

    def __and__(self, other: Mask) -> Mask:
        """What both show."""
        return self._with(other, both)

    def __or__(self, other: Mask) -> Mask:
        """What either shows."""
        if self.mask_mod is not None or getattr(other, "mask_mod", None) is not None:
            raise ValueError(
                "a mask_mod is joined with other masks by & alone; what | would add, let it show"
            )
        return self._with(other, either)

    def _with(self, other: Mask, join: Callable[[Layers, Layers], Layers]) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        align, lengths = common_place(self, other)
        ours, theirs = (Layers(layer.regions for layer in mask.layers) for mask in (self, other))
        return Mask(
            align=align,
            regions=join(ours, theirs),
            mask_mod=both_show(self.mask_mod, other.mask_mod),
            lengths=lengths,
        )

    @property
    def terms(self) -> tuple[Term, ...]:
        """What hides scores besides bands, in any layer."""
        return tuple(term for layer in self.layers for term in layer.terms)

    def draw(self, num_rows: int, num_cols: int | None = None) -> str:
        """The mask as text: a line for each row, with x for each key that it sees and . for each other.

        Of a `mask_mod` it is what the first head of the first batch entry sees.

        Raises:
            ValueError: there are other lengths, and the mask does not say where rows stand.
        """
        num_cols = num_rows if num_cols is None else num_cols
        placed = self.aligned(num_rows, num_cols)
        row, col = (
            torch.arange(n) + by for n, by in zip((num_rows, num_cols), placed.shift, strict=True)
        )
        seen = Seen(placed.layers, placed.mods).visible(torch.empty(1, 1), Place(row, col, 0))
        lines = seen.view(num_rows, num_cols).tolist()
        return "\n".join("".join(".x"[int(x)] for x in line) for line in lines)

    @property
    def mods(self) -> tuple[MaskMod, ...]:
        """The function that shows less than the layers do."""
        return () if self.mask_mod is None else (MaskMod(self.mask_mod),)

    @property
    def bounds(self) -> Bounds:
        """The boundaries of documents; (0,) where there is one document and no boundary."""
        return (0,) if self.documents is None else cast("Bounds", self.documents)

    @property
    def pair(self) -> tuple[Bounds, Bounds] | None:
        """The boundaries of documents of queries and of keys, where these are two sequences."""
        is_pair = self.documents is not None and isinstance(self.documents[0], tuple)
        return cast("tuple[Bounds, Bounds]", self.documents) if is_pair else None

    @property
    def is_causal(self) -> bool:
        """Whether no row sees a key after it."""
        return all(region.ahead <= 0 for layer in self.layers for region in layer.regions)

    @cached_property
    def bare(self) -> Mask:
        """The mask without its function, for what is kept: that holds tensors."""
        return self if self.mask_mod is None else replace(self, mask_mod=None)

    @property
    def is_windowed(self) -> bool:
        """Whether a row may not see keys that are far before it; of shifted rows it is taken so."""
        regions = (region for layer in self.layers for region in layer.regions)
        return self.shift != (0, 0) or any(region.lower > -FAR for region in regions)

    @property
    def depends_on_place(self) -> bool:
        """Whether what a row sees depends on where it stands over the keys."""
        if self.mask_mod is not None:
            return True
        if self.pair is not None:
            return self.sides != (None, None)
        regions = (region for layer in self.layers for region in layer.regions)
        return any(r.top > 0 or r.bottom < FAR or r.lower > -FAR or r.upper < FAR for r in regions)

    def aligned(self, num_rows: int, num_cols: int, *, positions: bool = False) -> Mask:
        """The mask for sequences of these lengths: it knows where rows stand over keys.

        Args:
            positions: whether a score depends on them, as with ALiBi.

        Raises:
            ValueError: it matters where they stand, and the mask does not say.
        """
        shift = shift_of(self, num_rows, num_cols, positions=positions)
        return self if shift == self.shift else replace(self, shift=shift)

    def place(self, rows: Span, cols: Span) -> tuple[int, int, int, int, int]:
        """Where two spans of one step meet: (row, number of rows, column, number of columns, step)."""
        assert rows.step == cols.step, "a layout has one step"
        (by_row, by_col), step = self.shift, rows.step
        return rows.start + by_row, rows.length, cols.start + by_col, cols.length, step

    def _crossed(
        self, of_q: Bounds, of_k: Bounds, lower: int, upper: int
    ) -> Iterable[Region | None]:
        """Yields the regions where documents of queries meet those of keys."""
        for (top, bottom), (left, right) in zip(pairwise(of_q), pairwise(of_k), strict=True):
            by = right - bottom if self.align == "bottom-right" else left - top
            low, high = (x if abs(x) == FAR else x + by for x in (lower, upper))
            yield Region(top, bottom, left, right, low, high).trimmed()
