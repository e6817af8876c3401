"""What `Dropout` does in the Triton kernels. Values are (factor, seed, threshold)."""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDS: tl.constexpr = tl.constexpr(7)  # as in dropout.py


@triton.jit
def draw(place, values):
    """Whether the weights of rows i and columns j are kept, which broadcast; see dropout.py."""
    i, j, row, col, step, batch, head = place
    r, c = row + i * step, col + j * step
    nothing = (r * 0 + c * 0).to(tl.uint32)
    c0, c1 = c.to(tl.uint32) + nothing, r.to(tl.uint32) + nothing
    c2, c3 = head.to(tl.uint32) + nothing, batch.to(tl.uint32) + nothing
    word, _, _, _ = tl.philox(values[1], c0, c1, c2, c3, n_rounds=ROUNDS)
    return word >= values[2].to(tl.uint32)


@triton.jit
def weigh(x, drawn, values):
    """Weights, or their gradients, times what dropout multiplies them by."""
    return tl.where(drawn, x * values[0], 0.0)
