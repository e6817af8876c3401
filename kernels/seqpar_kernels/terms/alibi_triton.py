"""What `Alibi` does in the Triton kernels. Values are (slopes `[hq]`,), of which a tile loads its own."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(values, head):
    """The slope of each head."""
    return (tl.load(values[0] + head),)


@triton.jit
def score(s, place, values):
    """(s - slope * |row - column|, 1)."""
    return s - values[0] * distance(place), 1.0


@triton.jit
def share(ds, place, values):
    """What each row of a tile adds to the gradient of its slope."""
    return -tl.sum(ds * distance(place), 1)


@triton.jit
def distance(place):
    """How many positions lie between row i and column j, which broadcast; float32."""
    i, j, row, col, step, _, _ = place
    return tl.abs((i - j) * step + (row - col)).to(tl.float32)
