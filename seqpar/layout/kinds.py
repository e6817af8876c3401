"""How sequences are dealt is said by a name, by what makes layouts, or by a layout of just such a sequence.

That is a `kind`. It is taken where whole sequences come in, whose lengths may differ: `shard_batch`,
`ShardedLoader`, `SequenceParallel.shard`. What takes rows that are dealt already takes their `Layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal, Protocol, get_args

from seqpar.layout.balance import balanced
from seqpar.layout.fits import check_size
from seqpar.layout.mask import Mask
from seqpar.layout.shards import LAYOUTS, Layout, MakeLayout


class MakeBalanced(Protocol):
    """The signature of `seqpar.balanced`."""

    def __call__(
        self, length: int, size: int, mask: Mask | Sequence[Mask], *, multiple_of: int = 1
    ) -> Layout:
        """The layout of `length` positions over `size` ranks, under a mask."""
        ...


LayoutName = Literal["contiguous", "zigzag", "striped", "balanced"]
LayoutKind = LayoutName | MakeLayout | MakeBalanced | Layout
NAMES: tuple[str, ...] = get_args(LayoutName)


def check_kind(kind: LayoutKind) -> None:
    """Refuses what says no way to deal a sequence.

    Raises:
        ValueError: it is a name of no layout.
        TypeError: it is no name, no function and no layout.
    """
    if kind in NAMES or callable(kind) or isinstance(kind, Layout):
        return
    allowed = f"kind must be one of {NAMES}, a function such as seqpar.zigzag, or a seqpar.Layout"
    if not isinstance(kind, str):
        raise TypeError(f"{allowed}, got {kind!r}")
    near = get_close_matches(kind, NAMES, n=1)
    raise ValueError(f"{allowed}, got {kind!r}{f': did you mean {near[0]!r}?' if near else ''}")


def layout_of(
    kind: LayoutKind,
    length: int,
    size: int,
    *,
    multiple_of: int = 1,
    mask: Mask | Sequence[Mask] | None = None,
) -> Layout:
    """The layout of `length` positions over `size` ranks that is meant by a kind.

    Args:
        multiple_of: shards are cut at multiples of this many positions.
        mask: of which "balanced" evens out the work; other kinds do not ask it.

    Raises:
        ValueError: it is a name of no layout; "balanced" without a mask; a layout of another length or number
            of ranks, or cut elsewhere than at the multiples; and what the function raises.
        TypeError: it is no name, no function and no layout, or the function makes none.
    """
    check_kind(kind)
    if kind == "balanced" or kind is balanced:
        if mask is None:
            raise ValueError("kind 'balanced' evens out the work under a mask; pass it as mask=")
        return balanced(length, size, mask, multiple_of=multiple_of)
    if isinstance(kind, Layout):
        layout = kind
    else:
        make = LAYOUTS[kind] if isinstance(kind, str) else kind
        layout = make(length, size, multiple_of=multiple_of)  # type: ignore[call-arg]
        if not isinstance(layout, Layout):
            raise TypeError(f"{kind!r} must make a seqpar.Layout, got {layout!r}")
    check_size(layout, size)
    if layout.length != length:
        raise ValueError(
            f"the sequences have {length} positions, got {layout} for them; sequences of any length are "
            "dealt by a name, such as 'zigzag', or a function, such as seqpar.zigzag"
        )
    if multiple_of != 1 and not isinstance(kind, str) and not layout.is_cut_at(multiple_of):
        raise ValueError(f"{layout} is not cut at multiples of {multiple_of} positions only")
    return layout
