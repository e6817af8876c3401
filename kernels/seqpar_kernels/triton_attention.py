"""Launches the Triton kernels: the `triton` implementation of `attend` and `attend_backward`.

A launch allocates nothing but two integers a row where terms hide scores, copies of inputs whose rows are
not contiguous, and a dq nobody wants where tensors of terms learn.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from threading import Lock
from types import ModuleType
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.beginnings import ADDED, Begins
from seqpar_kernels.block import Block
from seqpar_kernels.choice import interprets
from seqpar_kernels.partial import Partial
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.terms import Term
from seqpar_kernels.triton_backward import dkdv_kernel, dq_kernel
from seqpar_kernels.triton_forward import forward_kernel
from seqpar_kernels.tuning import L2_BYTES, Tiles, family, tiles_for

HOOKS = ("load", "score", "share", "draw", "weigh")  # the Triton functions that a term may have
SWIZZLED = 64  # elements of 16 bits, from which on tiles have the same swizzle of shared memory
# Ranks may be threads, of which Triton (3.6 to 3.9) lets one launch what another has not loaded yet. Its
# interpreter patches triton.language while a kernel runs.
_LAUNCH = Lock()


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
    tiles: Tiles | None = None,
    *,
    begins: bool = False,
) -> None:
    """Continues `into` with the block; where it begins, it holds nothing and is written."""
    q, k, v = (_rows_contiguous(x) for x in (q, k, v))
    tiles = tiles or tiles_for("forward", q, v)
    pack = _pack(q, k, tiles)
    num_tiles = triton.cdiv(q.shape[1] * pack, tiles.rows)
    packs = q.shape[0] * q.shape[2] // pack
    limits = block.row_limits(q.shape[1], k.shape[1], q.device)
    assert into.m.stride() == into.l.stride(), "m and l are made together"
    assert _is_row_contiguous(into.acc), "acc is written row by row"
    _launch_guarded(
        forward_kernel, num_tiles * packs, q,
        (q, k, v, into.acc, into.m, into.l, _given(limits, q)), _values(block),
        *_strides(q, k, v, into.acc, into.m),
        q.shape[1], k.shape[1], q.shape[2], packs, num_tiles, _section(k, v, packs),
        *_runtime(block, q, k),
        PACK=pack, BEGINS=begins, **_walk_columns(block, q, k, tiles),
        **_constants(block, tiles, q, k, v),
    )  # fmt: skip


def backward(
    of: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: RunningGradients,
    learned: Learned,
    begins: Begins = ADDED,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> None:
    """Adds the block's gradients to dq, dk, dv and learned tensors, given lse and delta of the whole rows.

    Those that begin are written. One kernel gives dq and what is learned, one dk and dv; each runs only if
    something of it is wanted.
    """
    q, k, v, dout = (_rows_contiguous(x) for x in (of.q, k, v, of.dout))
    dq, dk, dv = into
    assert all(x is None or _is_row_contiguous(x) for x in into), "gradients are written row by row"
    inputs = (q, k, v, dout, of.lse, of.delta)
    by_rows, by_cols = tiles or (tiles_for("dq", q, v), tiles_for("dkdv", q, v))
    if dq is not None or learned:
        # What nobody wants begins too: it is not read.
        scratch = torch.empty_like(q, dtype=of.lse.dtype) if dq is None else dq
        _launch_dq(inputs, block, scratch, learned, by_rows, begins=dq is None or begins[0])
    if dk is not None and dv is not None:
        _launch_dkdv(inputs, block, dk, dv, by_cols, begins=begins[1])


def rounds(dtype: torch.dtype) -> bool:
    """Whether kernels round what they store in this type. The interpreter truncates to bfloat16."""
    return dtype != torch.bfloat16 or not interprets()


def _launch_dq(
    inputs: tuple[Tensor, ...], block: Block, dq: Tensor, learned: Learned, tiles: Tiles, *, begins: bool
) -> None:  # fmt: skip
    q, k, v, dout, *_ = inputs
    b, i, hq, _ = q.shape
    pack = _pack(q, k, tiles)
    num_tiles, packs = triton.cdiv(i * pack, tiles.rows), b * hq // pack
    limits = block.row_limits(i, k.shape[1], q.device)
    shares, by_row = [], []
    for n, (term, functions) in enumerate(kernels_of(block)):
        if term.name in learned:
            shares.append((n, functions.share))
            by_row.append((learned[term.name], *learned[term.name].stride()))
    _launch_guarded(
        dq_kernel, num_tiles * packs, q,
        (*inputs, dq, _given(limits, q)), _values(block), tuple(by_row), *_strides(*inputs, dq),
        i, k.shape[1], hq, packs, num_tiles, _section(k, v, packs), *_runtime(block, q, k),
        PACK=pack, SHARES=tuple(shares), BEGINS=begins, **_walk_columns(block, q, k, tiles),
        **_constants(block, tiles, q, k, v, dout),
    )  # fmt: skip


def _launch_dkdv(
    inputs: tuple[Tensor, ...], block: Block, dk: Tensor, dv: Tensor, tiles: Tiles, *, begins: bool
) -> None:
    q, k, v, dout, *_ = inputs
    (b, i, *_), hkv = q.shape, k.shape[2]
    num_tiles, heads = triton.cdiv(k.shape[1], tiles.cols), b * hkv
    limits = block.col_limits(i, k.shape[1], q.device)
    _launch_guarded(
        dkdv_kernel, num_tiles * heads, q,
        (*inputs, dk, dv, _given(limits, q)), _values(block),
        *_strides(*inputs, dk, dv),
        i, k.shape[1], hkv, heads, num_tiles, _section(q, dout, heads), *_runtime(block, q, k),
        BEGINS=begins, **_walk_rows(block, q, k, tiles), **_constants(block, tiles, q, k, v, dout),
    )  # fmt: skip


def _constants(
    block: Block, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, *others: Tensor
) -> dict[str, Any]:
    d, vd = q.shape[3], v.shape[3]
    padded_d, padded_vd = padded_widths(d, vd)
    tallest = max(tiles.rows, tiles.cols) * max(x.stride(1) for x in (q, k, v, *others))
    return {
        "GROUP": q.shape[2] // k.shape[2],
        "D": d,
        "VD": vd,
        "PADDED_D": padded_d,
        "PADDED_VD": padded_vd,
        "ROWS": tiles.rows,
        "COLS": tiles.cols,
        **_functions(block),
        "PLAIN": block.is_plain and block.score.factor >= torch.finfo(torch.float32).tiny,
        "LIMITED": block.ranges is not None,
        "WIDE": tallest >= 2**31,
        "enable_fp_fusion": True,  # said aloud: versions of Triton differ in the default
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def padded(width: int) -> int:
    """The width of a tile in registers: a power of two that a matrix instruction can take."""
    return max(16, triton.next_power_of_2(width))


def padded_widths(d: int, vd: int) -> tuple[int, int]:
    """The widths of tiles of q and k, and of v: one swizzle of shared memory serves both."""
    # docs/design.md: tiles of q, k and v have one swizzle
    widths = padded(d), padded(vd)
    least = min(max(widths), SWIZZLED)
    return max(widths[0], least), max(widths[1], least)


def _runtime(block: Block, q: Tensor, k: Tensor) -> tuple[int | float, ...]:
    """Band, positions, scale and whole numbers of terms, as the kernels take them."""
    i, j, band = q.shape[1], k.shape[1], block.band
    whole = next((whole for term, _ in kernels_of(block) if (whole := term.whole())), (0, 0))
    return (
        -i if band.lower is None else max(band.lower, -i),
        j if band.upper is None else min(band.upper, j),
        block.row, block.col, block.step, block.head, block.batch, block.score.factor,
        *whole,
    )  # fmt: skip


def _walk_columns(block: Block, q: Tensor, k: Tensor, tiles: Tiles) -> dict[str, Any]:
    """For tiles of rows: do the last see most, and which phases may there be.

    The phases are 0, where the upper diagonal or the last column cuts a tile, 1, inside, and 2, where
    the lower diagonal does.
    """
    upper, lower = _cuts(block, q, k)
    packed = block.ranges is not None
    ragged = k.shape[1] % tiles.cols > 0
    return {
        "REVERSED": upper and not lower,
        "FROM": 0 if upper or packed or ragged else 1,
        "TO": 3 if lower or packed else 2,
    }


def _walk_rows(block: Block, q: Tensor, k: Tensor, tiles: Tiles) -> dict[str, Any]:
    """For tiles of columns, which see their rows the other way round: as `_walk_columns`."""
    upper, lower = _cuts(block, q, k)
    packed = block.ranges is not None
    ragged = q.shape[1] % tiles.rows > 0
    return {
        "REVERSED": lower and not upper,
        "FROM": 0 if upper or packed else 1,
        "TO": 3 if lower or packed or ragged else 2,
    }


def _cuts(block: Block, q: Tensor, k: Tensor) -> tuple[bool, bool]:
    """Whether the upper and the lower diagonal hide anything."""
    lower, upper = block.band.lower, block.band.upper
    return (
        upper is not None and upper < k.shape[1] - 1,
        lower is not None and lower > 1 - q.shape[1],
    )


def _pack(q: Tensor, k: Tensor, tiles: Tiles) -> int:
    """How many heads of a group share a tile of rows: all, where the rows alone would not fill it."""
    group = q.shape[2] // k.shape[2]
    return group if q.shape[1] * 2 <= tiles.rows else 1


def _section(x: Tensor, y: Tensor, programs: int) -> int:
    """How many heads to work on at once so that their rows stay in the L2 cache."""
    heads = x.shape[0] * x.shape[2]
    per_head = x.shape[1] * (x.shape[3] + y.shape[3]) * x.element_size()
    together = max(1, int(L2_BYTES[family(x.device)] / 2 / max(per_head, 1)))
    return max(1, min(programs, together * programs // heads))


def kernels_of(block: Block) -> list[tuple[Term, ModuleType]]:
    """The terms that do something inside of kernels, with the modules of their functions."""
    # docs/design.md: the Triton kernels compose terms
    return [
        (term, import_module(term.kernels)) for term in block.acting if term.kernels is not None
    ]


def _functions(block: Block) -> dict[str, Any]:
    """The functions of the terms, as the kernels take them, and which term takes the whole numbers.

    The source of functions in a tuple is no part of what Triton looks compiled kernels up by (3.6 to 3.9), so
    a change in one would go unnoticed. Here it is: a constant of its own.
    """
    kernels = kernels_of(block)
    whole = [n for n, (term, _) in enumerate(kernels) if term.whole()]
    assert len(whole) <= 1, "kernels have whole numbers for one term"
    return {
        **{
            f"{hook.upper()}S": tuple(getattr(functions, hook, None) for _, functions in kernels)
            for hook in HOOKS
            if hook != "share"
        },
        "WHOLE": whole[0] if whole else -1,
        "SOURCES": "".join(
            getattr(getattr(functions, hook, None), "cache_key", "")
            for _, functions in kernels
            for hook in HOOKS
        ),
    }


def _values(block: Block) -> tuple[tuple[float | Tensor, ...], ...]:
    """The values of the terms, as the kernels take them."""
    return tuple(term.values() for term, _ in kernels_of(block))


def _given(x: Tensor | None, instead: Tensor) -> Tensor:
    """The tensor, or one that takes its place where the kernel will not look at it."""
    return instead if x is None else x


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in x.stride()[:3]]


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if _is_row_contiguous(x) else x.contiguous()


def _is_row_contiguous(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _launch_guarded(
    kernel: Any,
    num_programs: int,
    on: Tensor,
    tensors: tuple[Tensor, ...],
    *args: Any,
    **constants: Any,
) -> None:
    """Launches a kernel that walks over tiles, and before it what keeps poison in its place.

    Where nothing is hidden, poison is in its place.
    """
    # docs/design.md: Triton programs that meet poison run apart
    hides = constants["FROM"] == 0 or constants["TO"] == 3
    if hides:
        flags = torch.empty(num_programs, dtype=torch.int32, device=on.device)
        alone = {**constants, "num_stages": 1, "GUARDED": False, "CLEANS": True}
        launch(kernel, num_programs, on, *tensors, flags, *args, **alone)
    else:
        flags = on
    launch(
        kernel, num_programs, on, *tensors, flags, *args, GUARDED=hides, CLEANS=False, **constants
    )


def launch(kernel: Any, num_programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """Launches a kernel on the device of a tensor; in a dry run, nothing."""
    if on.device.type == "meta":
        return
    # docs/design.md: one launch at a time
    with _LAUNCH, _current(on.device):
        kernel[(num_programs,)](*args, **constants)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """A block in which the device is the one that Triton launches on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
