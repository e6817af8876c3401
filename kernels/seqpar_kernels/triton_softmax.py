"""Small kernels around the softmax: merge partials, finish one, row dots, softmax of stored scores.

All work on rows: three leading dims in any strides, a contiguous last dim. A program takes some rows
and walks their columns. The stored-scores kernels take and give (max, sum) so that the columns of a row
may lie on several devices: combine maxima and sums in between.
Source: Milakov and Gimelshein 2018, Online normalizer calculation for softmax (arXiv:1805.02867).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.triton_attention import launch
from seqpar_kernels.triton_terms import LOG2E

ELEMENTS = 4096  # of a tile of rows; not tuned
ALIGNED = 16  # what Triton tells apart: whether this divides strides and addresses


@triton.jit
def _at(n, B, C, s0, s1, s2):
    """int64 offsets of rows n, counted over the leading dims [A, B, C]."""
    n = n.to(tl.int64)
    return (n // (B * C)) * s0 + ((n // C) % B) * s1 + (n % C) * s2


@triton.jit
def merge_kernel(
    ACC, M, L, NEW_ACC, NEW_M, NEW_L, count, B, C,
    a0, a1, a2, m0, m1, m2, x0, x1, x2, y0, y1, y2, z0, z1, z2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Adds (new_acc, new_m, new_l) to (acc, m, l); new_l is 1 unless WEIGHTED."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, e = n < count, tl.arange(0, PADDED)
    wide = there[:, None] & (e < WIDTH)[None, :]
    m_at = _at(n, B, C, m0, m1, m2)
    m = tl.load(M + m_at, mask=there, other=float("-inf"))
    l = tl.load(L + m_at, mask=there, other=0.0)
    new_m = tl.load(NEW_M + _at(n, B, C, y0, y1, y2), mask=there, other=float("-inf")).to(m.dtype)
    top = tl.maximum(m, new_m)
    origin = tl.where(top == float("-inf"), 0.0, top)
    keep, add = tl.exp2((m - origin) * LOG2E), tl.exp2((new_m - origin) * LOG2E)
    acc_at = ACC + _at(n, B, C, a0, a1, a2)[:, None] + e[None, :]
    new_at = NEW_ACC + _at(n, B, C, x0, x1, x2)[:, None] + e[None, :]
    acc = tl.load(acc_at, mask=wide, other=0.0)
    # A kernel may leave anything in the out of a row that saw nothing.
    new = tl.load(new_at, mask=wide & (new_m > float("-inf"))[:, None], other=0.0).to(acc.dtype)
    tl.store(acc_at, acc * keep[:, None] + new * add[:, None], mask=wide)
    if WEIGHTED:
        add = add * tl.load(NEW_L + _at(n, B, C, z0, z1, z2), mask=there, other=0.0).to(l.dtype)
    tl.store(L + m_at, l * keep + add, mask=there)
    tl.store(M + m_at, top, mask=there)


@triton.jit
def finish_kernel(
    ACC, M, L, JOINED, OUT, LSE, count, B, C,
    a0, a1, a2, m0, m1, m2, o0, o1, o2, l0, l1, l2,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, JOINS: tl.constexpr,
):  # fmt: skip
    """Out = acc / l and lse = m + log l, with exp(joined) of the row's head (dim C) in l if JOINS."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there, e = n < count, tl.arange(0, PADDED)
    wide = there[:, None] & (e < WIDTH)[None, :]
    m_at = _at(n, B, C, m0, m1, m2)
    m = tl.load(M + m_at, mask=there, other=float("-inf"))
    l = tl.load(L + m_at, mask=there, other=0.0)
    acc_at = ACC + _at(n, B, C, a0, a1, a2)[:, None] + e[None, :]
    acc = tl.load(acc_at, mask=wide & (l != 0.0)[:, None], other=0.0)
    if JOINS:
        logit = tl.load(JOINED + n % C, mask=there, other=0.0).to(m.dtype)
        top = tl.maximum(m, logit)
        top = tl.where(top == float("-inf"), 0.0, top)
        keep = tl.exp2((m - top) * LOG2E)
        l = l * keep + tl.exp2((logit - top) * LOG2E)
        acc, m = acc * keep[:, None], top
    seen = tl.where(l == 0.0, 1.0, l)
    out_at = OUT + _at(n, B, C, o0, o1, o2)[:, None] + e[None, :]
    tl.store(out_at, (acc / seen[:, None]).to(OUT.dtype.element_ty), mask=wide)
    tl.store(LSE + _at(n, B, C, l0, l1, l2), m + tl.log(l), mask=there)


# docs/design.md: sums of rows do not see strides
@triton.jit(do_not_specialize=[
    "X", "Y", "TOTAL", "count", "B", "C", "width", "x0", "x1", "x2", "y0", "y1", "y2", "t0", "t1", "t2",
])  # fmt: skip
def dot_kernel(
    X, Y, TOTAL, count, B, C, width, x0, x1, x2, y0, y1, y2, t0, t1, t2,
    COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Total += sum of x * y over the columns. See `aligned_dot_kernel`."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < count
    total_at = TOTAL + _at(n, B, C, t0, t1, t2)
    total = tl.load(total_at, mask=there, other=0.0)
    x_at, y_at = X + _at(n, B, C, x0, x1, x2), Y + _at(n, B, C, y0, y1, y2)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        inside = there[:, None] & (c < width)[None, :]
        x = tl.load(x_at[:, None] + c[None, :], mask=inside, other=0.0).to(total.dtype)
        y = tl.load(y_at[:, None] + c[None, :], mask=inside, other=0.0).to(total.dtype)
        total += tl.sum(x * y, 1)
    tl.store(total_at, total, mask=there)


# The same where rows are known to begin at multiples of 16 elements: 16 bytes a load, in one layout.
aligned_dot_kernel = triton.jit(
    dot_kernel.fn, do_not_specialize=["TOTAL", "count", "B", "C", "t0", "t1", "t2"]
)


# docs/design.md: sums of rows do not see strides
@triton.jit(do_not_specialize=[
    "S", "M", "L", "count", "B", "C", "width", "s0", "s1", "s2", "m0", "m1", "m2",
])  # fmt: skip
def sums_kernel(
    S, M, L, count, B, C, width, s0, s1, s2, m0, m1, m2,
    COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(m, l) continued with scores s; -inf is hidden."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < count
    m_at = _at(n, B, C, m0, m1, m2)
    m = tl.load(M + m_at, mask=there, other=float("-inf"))
    l = tl.load(L + m_at, mask=there, other=0.0)
    s_at = S + _at(n, B, C, s0, s1, s2)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        inside = there[:, None] & (c < width)[None, :]
        s = tl.load(s_at[:, None] + c[None, :], mask=inside, other=float("-inf")).to(m.dtype)
        top = tl.maximum(m, tl.max(s, 1))
        origin = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2((s - origin[:, None]) * LOG2E)
        l = l * tl.exp2((m - origin) * LOG2E) + tl.sum(p, 1)
        m = top
    tl.store(M + m_at, m, mask=there)
    tl.store(L + m_at, l, mask=there)


@triton.jit
def weights_kernel(
    S, M, L, P, count, B, C, width, s0, s1, s2, m0, m1, m2, p0, p1, p2,
    COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """P = exp(s - m) / l, and 0 in rows that see nothing."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < count
    m_at = _at(n, B, C, m0, m1, m2)
    m = tl.load(M + m_at, mask=there, other=0.0)
    l = tl.load(L + m_at, mask=there, other=1.0)
    m, l = tl.where(l == 0.0, 0.0, m), tl.where(l == 0.0, 1.0, l)
    s_at, p_at = S + _at(n, B, C, s0, s1, s2), P + _at(n, B, C, p0, p1, p2)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        inside = there[:, None] & (c < width)[None, :]
        s = tl.load(s_at[:, None] + c[None, :], mask=inside, other=float("-inf")).to(m.dtype)
        p = tl.exp2((s - m[:, None]) * LOG2E) / l[:, None]
        p = tl.where(s == float("-inf"), 0.0, p)  # a row that is NaN is so only where it sees a key
        tl.store(p_at[:, None] + c[None, :], p.to(P.dtype.element_ty), mask=inside)


@triton.jit
def ds_kernel(
    P, DP, DELTA, DS, count, B, C, width, p0, p1, p2, g0, g1, g2, d0, d1, d2, s0, s1, s2,
    COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Ds = p (dp - delta), and 0 where p is 0, whatever the others are."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = n < count
    delta = tl.load(DELTA + _at(n, B, C, d0, d1, d2), mask=there, other=0.0)
    p_at, dp_at = P + _at(n, B, C, p0, p1, p2), DP + _at(n, B, C, g0, g1, g2)
    ds_at = DS + _at(n, B, C, s0, s1, s2)
    for start in range(0, width, COLS):
        c = start + tl.arange(0, COLS)
        inside = there[:, None] & (c < width)[None, :]
        p = tl.load(p_at[:, None] + c[None, :], mask=inside, other=0.0).to(delta.dtype)
        dp = tl.load(dp_at[:, None] + c[None, :], mask=inside, other=0.0).to(delta.dtype)
        ds = tl.where(p == 0.0, 0.0, p * (dp - delta[:, None]))
        tl.store(ds_at[:, None] + c[None, :], ds.to(DS.dtype.element_ty), mask=inside)


def merge_(
    into: tuple[Tensor, Tensor, Tensor],
    acc: Float[Tensor, "a b c w"],
    m: Float[Tensor, "a b c"],
    l: Float[Tensor, "a b c"] | None = None,
) -> None:
    """Adds another partial of the same rows to `into` = (acc, m, l), in place; see `Partial.merge_`."""
    width, given = acc.shape[-1], m if l is None else l
    rows = max(1, ELEMENTS // triton.next_power_of_2(width))
    _launch(
        merge_kernel, acc.shape[:3], rows, (*into, acc, m, given),
        (into[0], into[1], acc, m, given), (),
        WIDTH=width, PADDED=triton.next_power_of_2(width), WEIGHTED=l is not None,
    )  # fmt: skip


def finish(
    acc: Float[Tensor, "a b c w"],
    m: Float[Tensor, "a b c"],
    l: Float[Tensor, "a b c"],
    dtype: torch.dtype,
    joined: Float[Tensor, "c"] | None = None,
) -> tuple[Float[Tensor, "a b c w"], Float[Tensor, "a b c"]]:
    """(out, lse) in one pass, out in `dtype`; see `Partial.finish`. Leaves the partial as it was."""
    out, lse = torch.empty_like(acc, dtype=dtype), torch.empty_like(m)
    width = acc.shape[-1]
    rows = max(1, ELEMENTS // triton.next_power_of_2(width))
    _launch(
        finish_kernel, acc.shape[:3], rows,
        (acc, m, l, m if joined is None else joined.contiguous(), out, lse),
        (acc, m, out, lse), (),
        WIDTH=width, PADDED=triton.next_power_of_2(width), JOINS=joined is not None,
    )  # fmt: skip
    return out, lse


def add_dot_(
    x: Float[Tensor, "a b c w"], y: Float[Tensor, "a b c w"], into: Float[Tensor, "a b c"]
) -> None:
    """Adds the sums of x * y over the last dim to `into`: delta, from out and dout or from p and dp."""
    cols, rows = _tile(x)
    kernel = dot_kernel
    if x.shape[-1] % ALIGNED == 0:  # by the width alone, so that the order of a sum is
        kernel, x, y = aligned_dot_kernel, _aligned(x), _aligned(y)
    _launch(kernel, x.shape[:3], rows, (x, y, into), (x, y, into), (x.shape[-1],), COLS=cols)


def add_sums_(
    s: Float[Tensor, "a b c j"],
    m: Float[Tensor, "a b c"],
    l: Float[Tensor, "a b c"],
) -> None:
    """Continues the running maximum and sum of exponentials of rows with more of their scores."""
    assert m.stride() == l.stride(), "m and l are made together"
    cols, rows = _tile(s)
    _launch(sums_kernel, s.shape[:3], rows, (s, m, l), (s, m), (s.shape[-1],), COLS=cols)


def weights(
    s: Float[Tensor, "a b c j"],
    m: Float[Tensor, "a b c"],
    l: Float[Tensor, "a b c"],
    dtype: torch.dtype,
) -> Float[Tensor, "a b c j"]:
    """The softmax weights of stored scores, given the maximum and sum over *all* columns of a row."""
    assert m.stride() == l.stride(), "m and l are made together"
    p = torch.empty_like(s, dtype=dtype)
    cols, rows = _tile(s)
    _launch(weights_kernel, s.shape[:3], rows, (s, m, l, p), (s, m, p), (s.shape[-1],), COLS=cols)
    return p


def score_gradient(
    p: Float[Tensor, "a b c j"], dp: Float[Tensor, "a b c j"], delta: Float[Tensor, "a b c"]
) -> Float[Tensor, "a b c j"]:
    """Ds = p (dp - delta), with delta over *all* columns of a row; in the type of dp."""
    ds = torch.empty_like(dp)
    cols, rows = _tile(p)
    tensors = (p, dp, delta, ds)
    _launch(ds_kernel, p.shape[:3], rows, tensors, tensors, (p.shape[-1],), COLS=cols)
    return ds


def _aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy, whose rows begin at multiples of 16 elements and 16 bytes."""
    starts = x.data_ptr() % ALIGNED, *(stride % ALIGNED for stride in x.stride()[:3])
    # `contiguous` would leave as it is what begins elsewhere, and strides of one element.
    return x.clone(memory_format=torch.contiguous_format) if any(starts) else x


def _tile(x: Tensor) -> tuple[int, int]:
    """(columns, rows) of a program's tile."""
    cols = min(1024, max(16, triton.next_power_of_2(x.shape[-1])))
    return cols, ELEMENTS // cols


def _launch(kernel, leading, rows, tensors, strided, sizes, **constants) -> None:
    """Launches a kernel of this file over all rows of the leading dims."""
    a, b, c = leading
    if a * b * c == 0:
        return
    assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in strided if x.ndim == 4), (
        "columns are contiguous"
    )
    strides = [s for x in strided for s in x.stride()[:3]]
    launch(
        kernel, triton.cdiv(a * b * c, rows), tensors[0],
        *tensors, a * b * c, b, c, *sizes, *strides,
        ROWS=rows, enable_fp_fusion=True, **constants,
    )  # fmt: skip
