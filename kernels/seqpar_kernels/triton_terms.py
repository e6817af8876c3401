"""What the Triton kernels share: loading tiles, who sees whom, scores, dropout, order of programs.

Visibility is one range of columns per row (and, seen from the keys, one range of rows per column),
whatever it comes from: band, document or the end of the tensor. The ranges of consecutive rows move
one way, so their smallest and largest ends say which tiles to visit and which of them need a mask.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
ROUNDS: tl.constexpr = tl.constexpr(7)  # as in dropout.py
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b):
    """The product a b in float32. Float32 operands are not rounded to tf32."""
    if INTERPRETED:  # which would multiply the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, c):
    """The product a b plus c in float32, with the float32 a rounded to the type of b."""
    if INTERPRETED:  # which would truncate where devices round
        return tl.dot(a, b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, c, input_precision="ieee")


@triton.jit
def load_tile(
    base, first, stride, num_rows,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BOUNDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows first ... first + ROWS - 1 of `[num_rows, WIDTH]` as `[ROWS, PADDED]`, zeros outside.

    WIDE: row * stride may not fit 32 bits inside a tile; across tiles it never has to.
    """
    r, c = tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (r < num_rows - first)[:, None]
    if WIDE:
        r = r.to(tl.int64)
    at = base + tl.cast(first, tl.int64) * stride + (r[:, None] * stride + c[None, :])
    if BOUNDED:
        if WIDTH < PADDED:
            inside = inside & (c < WIDTH)[None, :]
        return tl.load(at, mask=inside, other=0.0)
    if WIDTH < PADDED:
        return tl.load(at, mask=(c < WIDTH)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def places(index, row_stride, head_stride, PACK: tl.constexpr):
    """int64 offsets of packed rows: PACK heads of row 0, then of row 1, ..."""
    row, head = index // PACK, index % PACK
    return row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride


@triton.jit
def sees(index, lower, upper, num_others, LIMITS, LIMITED: tl.constexpr):
    """The range (first, last + 1) of others that each index sees."""
    first = tl.maximum(index + lower, 0)
    end = tl.minimum(index + upper + 1, num_others)
    if LIMITED:
        first = tl.maximum(first, tl.load(LIMITS + 2 * index))
        end = tl.minimum(end, tl.load(LIMITS + 2 * index + 1))
    return first, end


@triton.jit
def visits(first, end, TILE: tl.constexpr, LATE: tl.constexpr):
    """Tiles to visit and, inside them, tiles that all see whole: (start, inner start, inner stop, stop).

    If none is seen whole by all, the inner range is empty and lies at the start, or if LATE at the stop.
    """
    start = tl.min(first, 0) // TILE
    stop = tl.maximum(tl.cdiv(tl.max(end, 0), TILE), start)
    inner = tl.cdiv(tl.max(first, 0), TILE)
    inner_stop = tl.min(end, 0) // TILE
    hollow = inner >= inner_stop
    inner = tl.where(hollow, stop if LATE else start, inner)
    inner_stop = tl.where(hollow, stop if LATE else start, inner_stop)
    return start, inner, inner_stop, stop


@triton.jit
def program(num_tiles, num_heads, section, REVERSED: tl.constexpr):
    """(tile, head) of this program.

    Sections of heads whose keys and values fit the L2 cache together are finished one after the other,
    in each the tiles with most work first, so that the short ones fill up the last wave.
    """
    pid = tl.program_id(0)
    start = (pid // (section * num_tiles)) * section
    width = tl.minimum(section, num_heads - start)
    rest = pid - start * num_tiles
    tile, head = rest // width, start + rest % width
    if REVERSED:
        tile = num_tiles - 1 - tile
    return tile, head


@triton.jit
def tanh(x):
    """Within one rounding step or two of float32. Source: Moshier, Cephes, tanhf."""
    z = x * x
    near = -5.70498872745e-3
    near = near * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    far = tl.where(x < 0, -far, far)
    return tl.where(a < 0.625, near, far)


@triton.jit
def distance(i, j, apart, step):
    """How many positions lie between row i and column j, which broadcast; float32."""
    return tl.abs((i - j) * step + apart).to(tl.float32)


@triton.jit
def scores(
    x, i, j, apart, step, slope, scale, softcap,
    CAP: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """(s, ds / d(scale x)) for x = q.k of rows i and columns j. A plain score stays x: see `unit`."""
    bend = 1.0
    if PLAIN:
        s = x
    else:
        s = x * scale
        if CAP:
            bent = tanh(s / softcap)
            s = bent * softcap
            bend = 1.0 - bent * bent
        if BIAS:
            s = s - slope * distance(i, j, apart, step)
    return s, bend


@triton.jit
def unit(scale, PLAIN: tl.constexpr):
    """What scores are multiplied by on their way into an exponential: one operation less when plain."""
    if PLAIN:
        return scale
    return scale * 0.0 + 1.0


@triton.jit
def keeps(seed, threshold, batch, head, i, j, row, col, step):
    """Whether dropout keeps the weights of rows i and columns j, which broadcast; see dropout.py."""
    r, c = row + i * step, col + j * step
    nothing = (r * 0 + c * 0).to(tl.uint32)
    c0, c1 = c.to(tl.uint32) + nothing, r.to(tl.uint32) + nothing
    c2, c3 = head.to(tl.uint32) + nothing, batch.to(tl.uint32) + nothing
    word, _, _, _ = tl.philox(seed, c0, c1, c2, c3, n_rounds=ROUNDS)
    return word >= threshold.to(tl.uint32)
