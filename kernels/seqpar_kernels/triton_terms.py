"""What the Triton kernels share: loading tiles, who sees whom, what terms do, order of programs.

Visibility is one range of columns per row (and, seen from the keys, one range of rows per column),
whatever it comes from: band, document or the end of the tensor. The ranges of consecutive rows move
one way, so their smallest and largest ends say which tiles to visit and which of them need a mask.

Terms come as tuples of functions, one for each term or `None`, and a tuple of their values. Functions are
told a place: (i, j, row, col, step, batch, head), where i and j are rows and columns of the block and
broadcast, row, col and step make positions of them, and head is that of the whole attention.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
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
def is_finite(x):
    """Whether each entry of a tile is."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def cleaned(x):
    """The tile with zeros for what is not finite."""
    return tl.where(is_finite(x), x, 0.0).to(x.dtype)


@triton.jit
def meets(visible, x):
    """For each row of `visible`, 1 if it shows one of the rows of x that are not finite, else 0."""
    bad = tl.max(tl.where(is_finite(x), 0, 1), 1)
    return tl.max(tl.where(visible, bad[None, :], 0), 1)


@triton.jit
def holds(x):
    """1 if a tile holds something that is not finite, else 0."""
    return tl.max(tl.max(tl.where(is_finite(x), 0, 1), 1), 0)


@triton.jit
def edges_hold(
    base, stride, num_rows, start, inner, inner_stop, stop,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """1 if a tile that is not seen whole by all holds something that is not finite, else 0; see `visits`."""
    found = 0
    for edge in tl.static_range(2):
        low, high = (start, inner) if edge == 0 else (inner_stop, stop)
        for t in range(low, high):
            x = load_tile(base, t * ROWS, stride, num_rows, ROWS, WIDTH, PADDED, True, WIDE)
            found = tl.maximum(found, holds(x))
    return found


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
def loaded(VALUES, whole, head, LOADS: tl.constexpr, WHOLE: tl.constexpr):
    """What terms take into the walk over tiles, in their order. Heads are those of the block."""
    ready = ()
    for t in tl.static_range(len(LOADS)):
        values = VALUES[t]
        if LOADS[t] is not None:
            values = LOADS[t](values, head)
        if t == WHOLE:
            values = values + whole
        ready = ready + (values,)
    return ready


@triton.jit
def scores(x, place, values, scale, SCORES: tl.constexpr, PLAIN: tl.constexpr):
    """(s, ds / d(scale x)) for x = q.k at a place. A plain score stays x: see `unit`."""
    bend = 1.0
    if PLAIN:
        s = x
    else:
        s = x * scale
        for t in tl.static_range(len(SCORES)):
            if SCORES[t] is not None:
                s, slope = SCORES[t](s, place, values[t])
                bend = bend * slope
    return s, bend


@triton.jit
def draws(place, values, DRAWS: tl.constexpr):
    """What terms draw of the weights at a place, for `weighed`, in their order."""
    drawn = ()
    for t in tl.static_range(len(DRAWS)):
        if DRAWS[t] is not None:
            drawn = drawn + (DRAWS[t](place, values[t]),)
        else:
            drawn = drawn + (0,)
    return drawn


@triton.jit
def weighed(x, drawn, values, WEIGHS: tl.constexpr):
    """Weights, or their gradients, times what terms multiply them by."""
    for t in tl.static_range(len(WEIGHS)):
        if WEIGHS[t] is not None:
            x = WEIGHS[t](x, drawn[t], values[t])
    return x


@triton.jit
def unit(scale, PLAIN: tl.constexpr):
    """What scores are multiplied by on their way into an exponential: one operation less when plain."""
    if PLAIN:
        return scale
    return scale * 0.0 + 1.0
