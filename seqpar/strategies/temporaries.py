"""What the CPU op holds beside its arguments while it attends a block; nothing for other kernels.

The sizes of its tiles are those of torch 2.13, `aten/src/ATen/native/cpu/FlashAttentionKernel.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from seqpar.strategies.plan import Plan, Spans
from seqpar.strategies.volume import Shape
from seqpar_kernels import accumulation_dtype
from seqpar_kernels.aten import BACKWARD_COLUMNS, BACKWARD_COLUMNS_ELSE
from seqpar_kernels.rectangles import cut, rectangles, strips

KEYS_OF_A_TILE = 512
PACKED_ROWS = 64  # of queries a thread, from which k and v are worth a copy; with 32 none is made
ROWS_OF_A_TILE = ((768, 256), (192, 64), (0, 32))  # (from so many query rows, rows)


@dataclass(frozen=True)
class _Call:
    """Rows and columns of a call of the op, and whether its rows are all of their tensor."""

    rows: int
    cols: int
    is_whole: bool


def forward_bytes(plan: Plan, rows: Spans, cols: Spans, shape: Shape) -> int:
    """At the fullest moment of `attend` of these rows over these keys."""
    op, blocks = _Op(shape), _blocks(plan, rows, cols, shape)
    return max((op.padded(*size) + op.forward(calls) for size, calls in blocks), default=0)


def backward_bytes(
    plan: Plan, rows: Spans, cols: Spans, shape: Shape, *, packed: bool = False
) -> int:
    """At the fullest moment of `attend_backward`.

    Args:
        packed: whether dout is part of a parcel, of which the op makes a contiguous copy.
    """
    op, blocks = _Op(shape), _blocks(plan, rows, cols, shape, backward=True)
    return max(
        (op.padded(*size, backward=True) + op.backward(calls, packed) for size, calls in blocks),
        default=0,
    )


def _blocks(
    plan: Plan, rows: Spans, cols: Spans, shape: Shape, *, backward: bool = False
) -> Iterator[tuple[tuple[int, int], list[_Call]]]:
    """(rows and columns, calls of the op) of each block in turn."""
    if plan.implementation not in (None, "aten"):
        return
    width = BACKWARD_COLUMNS.get(shape.dtype, BACKWARD_COLUMNS_ELSE)
    how = partial(strips, width=width) if backward else rectangles
    all_rows = sum(span.length for span in rows)
    for of_rows, of_cols, block in plan.blocks(rows, cols, plan.score.resolve(shape.d), 0):
        size = _length(of_rows), _length(of_cols)
        calls = ((_length(x.rows), _length(x.cols)) for x in cut(block, *size, how))
        # With grouped heads every batch element is a call of its own; two tell of any number.
        times = min(shape.batch, 2) if shape.hq != shape.hkv else 1
        yield size, [_Call(i, j, i == all_rows) for i, j in calls for _ in range(times)]


def _length(s: slice) -> int:
    return int(s.stop - s.start)


def _has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class _Op:
    """Bytes of what the op is given, gives back and works with."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._is_grouped = shape.hq != shape.hkv
        self._width = max(shape.d, shape.vd)
        self._wide = accumulation_dtype(shape.dtype).itemsize
        self._is_float16 = shape.dtype == torch.float16  # computed in float32
        self._item = self._wide if self._is_float16 else shape.dtype.itemsize

    def padded(self, rows: int, cols: int, *, backward: bool = False) -> int:
        """Copies in one width and, of float16, in float32, of a whole block."""
        shape, total = self._shape, 0
        narrow_q, narrow_v = (self._is_float16 or w < self._width for w in (shape.d, shape.vd))
        total += narrow_q * (rows * shape.hq + cols * shape.hkv)
        total += narrow_v * (cols * shape.hkv + backward * 2 * rows * shape.hq)
        return shape.batch * total * self._width * self._item

    def forward(self, calls: Sequence[_Call]) -> int:
        """Out and lse of a call and of the one before; then statistics to merge with, and wide out."""
        most, before = 0, 0
        casts = self._wide > self._item
        for call in calls:
            rows = self._batch * call.rows * self._shape.hq
            now = rows * (self._width * self._item + self._wide)
            merging = rows * (3 + casts * self._shape.vd) * self._wide
            most = max(most, before + now + self._tiles(call), now + merging)
            before = now
        return most

    def backward(self, calls: Sequence[_Call], packed: bool) -> int:
        """Dq, dk, dv of a call and of the one before, contiguous dout, and two tiles of scores."""
        shape, most, before = self._shape, 0, 0
        is_padded = shape.vd < self._width or self._is_float16
        for call in calls:
            row = self._batch * shape.hq * self._width * self._item
            now = row * (call.rows + 2 * call.cols)
            in_parts = shape.hkv > 1 if self._is_grouped else shape.batch > 1 and not call.is_whole
            copy = row * call.rows * (in_parts or (packed and not is_padded))
            most = max(most, before + now + copy + self._tiles(call, backward=True))
            before = now
        return most

    @property
    def _packs(self) -> bool:
        """Whether forward makes copies of k and v in the order that AMX wants, and transposes a tile."""
        return self._shape.dtype == torch.bfloat16 and _has_amx()

    @property
    def _batch(self) -> int:
        return 1 if self._is_grouped else self._shape.batch

    def _tiles(self, call: _Call, *, backward: bool = False) -> int:
        """Scores of a tile, per thread; in half precision twice, and forward its rows of out."""
        height = min(next(size for least, size in ROWS_OF_A_TILE if call.rows >= least), call.rows)
        width = min(KEYS_OF_A_TILE, call.cols)
        half = self._item if self._item < self._wide else 0
        if backward:
            size = 2 * height * width * (self._wide + half)
        else:
            size = height * ((width + 2 + self._width) * self._wide + width * half)
        num_threads = torch.get_num_threads()
        if not backward and self._packs and call.rows >= PACKED_ROWS * num_threads:
            row = self._width * self._item
            size += width * row
            return num_threads * size + 2 * self._batch * self._shape.hq * call.cols * row
        return num_threads * size
