"""The fast implementation on CPU: torch's own flash attention, forward and backward.

The op knows `is_causal`, equal head counts and equal widths of q and v. The band becomes rectangles,
grouped heads become strides of zero (K and V are not copied), unequal widths are padded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.beginnings import ADDED, Begins, first_touches, put
from seqpar_kernels.block import Block
from seqpar_kernels.caches import level_2_bytes
from seqpar_kernels.partial import Partial
from seqpar_kernels.rectangles import CAUSAL, FULL, Rectangle, cut, rectangles, strips
from seqpar_kernels.reference import visibility
from seqpar_kernels.rows import Learned, Rows, RunningGradients
from seqpar_kernels.torch_internals import CPU_FLASH, attention_ops

_forward, _backward = attention_ops(CPU_FLASH)

# docs/design.md: the backward is cut where caches are small
STRIP_COLUMNS = 384
ROOMY_CACHE = 2 << 20  # bytes of the second level, from which on strips bring nothing
ALIGNED = 16  # bytes
ADDED_ROWS = 256  # of a gradient that is added to a sum of a wider type: they stay in cache


def _strip_width(dtype: torch.dtype) -> int:
    """Columns per call of the backward op."""
    if dtype == torch.bfloat16 or level_2_bytes() >= ROOMY_CACHE:
        return sys.maxsize
    return STRIP_COLUMNS


HeadsFirst = Callable[[Tensor], Tensor]


def forward(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: Partial,
) -> None:
    """Continues `into` with the block."""
    q, k, v = _as_the_op_wants(q, k, v)
    q, scale, _ = positive(q, block.score.factor)
    for rect in cut(block, q.shape[1], k.shape[1], rectangles):
        causal, mask = _how(rect, q)
        part = into[rect.rows]
        for of_q, of_kv in _heads_first(q, k):
            out, lse = _forward(
                of_q(q[:, rect.rows]), of_kv(k[:, rect.cols]), of_kv(v[:, rect.cols]),
                0.0, causal, attn_mask=mask, scale=scale,
            )  # fmt: skip
            out = out[..., : into.acc.shape[-1]]
            Partial(*(of_q(x) for x in (part.acc, part.m, part.l))).merge_(out, lse)


def backward(
    of: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
    into: RunningGradients,
    learned: Learned,
    begins: Begins = ADDED,
) -> None:
    """Adds the block's gradients to those wanted of dq, dk, dv, given the out and lse of the whole rows.

    Those that begin are written.

    The op computes all three, and derives delta from `out` itself, so it wants `out` where other kernels
    want delta.
    """
    assert not learned, "blocks with learned tensors never come here"
    assert not of.lse_learns, "rows whose delta is not that of `out` never come here"
    q, k, v, out, dout = _as_the_op_wants(of.q, k, v, of.out, of.dout)
    q, scale, sign = positive(q, block.score.factor)
    width = _strip_width(q.dtype)
    rects = [*cut(block, q.shape[1], k.shape[1], partial(strips, width=width))]
    by_rows = first_touches([rect.rows for rect in rects], into[0], begins=begins[0])
    by_cols = first_touches([rect.cols for rect in rects], *into[1:], begins=begins[1])
    for rect, begins_q, begins_kv in zip(rects, by_rows, by_cols, strict=True):
        causal, mask = _how(rect, q)
        parts = (rect.rows, rect.cols, rect.cols)
        dq, dk, dv = (
            None if x is None else x[:, part] for x, part in zip(into, parts, strict=True)
        )
        for of_q, of_kv in _heads_first(q, k):
            dq_t, dk_t, dv_t = _backward(
                of_q(dout[:, rect.rows]), of_q(q[:, rect.rows]), of_kv(k[:, rect.cols]),
                of_kv(v[:, rect.cols]), of_q(out[:, rect.rows]), of_q(of.lse[:, rect.rows]),
                0.0, causal, attn_mask=mask, scale=scale,
            )  # fmt: skip
            if dq is not None:
                _add(of_q(dq), dq_t[..., : dq.shape[-1]], sign, begins=begins_q)
            for total, grad in ((dk, dk_t), (dv, dv_t)):
                if total is not None:
                    _add_heads(of_kv(total), grad, begins=begins_kv)


def forward_whole(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    block: Block,
) -> tuple[Float[Tensor, "b i hq vd"], Float[Tensor, "b i hq"]] | None:
    """(out, lse) of a block that all rows see some of, if one call gives them; of float16 out is float32."""
    found = _at_once(block, q, k)
    if found is None:
        return None
    (cols, causal), vd = found, v.shape[-1]
    q, k, v = (x.transpose(1, 2) for x in _as_the_op_wants(q, k, v))
    q, scale, _ = positive(q, block.score.factor)
    out, lse = _forward(q, k[:, :, cols], v[:, :, cols], 0.0, causal, scale=scale)
    out = out[..., :vd].transpose(1, 2)
    return out.contiguous(), lse.transpose(1, 2).contiguous()


def backward_whole(
    dout: Float[Tensor, "b i hq vd"],
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    out: Float[Tensor, "b i hq vd"],
    lse: Float[Tensor, "b i hq"],
    block: Block,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(dq, dk, dv) of a block that is all there is, in the type of q, if one call gives them."""
    found, j = _at_once(block, q, k), k.shape[1]
    if found is None or found[0] != slice(0, j) or j > _strip_width(q.dtype):
        return None
    dtype, widths = q.dtype, (q.shape[-1], k.shape[-1], v.shape[-1])
    q, k, v, out, dout = (x.transpose(1, 2) for x in _as_the_op_wants(q, k, v, out, dout))
    q, scale, sign = positive(q, block.score.factor)
    if sign != 1:
        return None
    lse = lse.transpose(1, 2)
    grads = _backward(dout, q, k, v, out, lse, 0.0, found[1], scale=scale)
    dq, dk, dv = (
        x[..., :w].transpose(1, 2).to(dtype).contiguous()
        for x, w in zip(grads, widths, strict=True)
    )
    return dq, dk, dv


def _at_once(block: Block, q: Tensor, k: Tensor) -> tuple[slice, bool] | None:
    """(columns, is_causal) of the one call that has all rows, no mask and a kv head for each query head."""
    if q.shape[2] != k.shape[2]:
        return None
    found = list(islice(cut(block, q.shape[1], k.shape[1], rectangles), 2))
    if len(found) != 1 or found[0].rows != slice(0, q.shape[1]):
        return None
    if found[0].band not in (FULL, CAUSAL):
        return None
    return found[0].cols, found[0].band == CAUSAL


def positive(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """(q, scale, sign) with the sign of the scale moved into q.

    The op multiplies its -inf for hidden scores by the scale: a negative or zero one shows them.
    """
    if q.dtype != torch.float64 and abs(scale) < torch.finfo(torch.float32).tiny:
        scale = 0.0  # what float32 makes of it
    if scale > 0:
        return q, scale, 1
    sign = -1 if scale < 0 else 0
    return q * sign, abs(scale) or 1.0, sign


def _heads_first(q: Tensor, k: Tensor) -> Iterator[tuple[HeadsFirst, HeadsFirst]]:
    """Pairs of functions that view `[b s h ...]` as `[n h s ...]`: one for q's side, one for k's.

    With grouped heads each batch element is a call of its own, whose batch dim is the kv head: then
    one stride of zero repeats k over its query heads, and nothing is copied.
    """
    hq, hkv = q.shape[2], k.shape[2]
    if hq == hkv:
        yield (lambda x: x.transpose(1, 2)), (lambda x: x.transpose(1, 2))
        return
    group = hq // hkv
    for n in range(q.shape[0]):
        yield partial(_queries_of, n, hkv), partial(_keys_of, n, group)


def _queries_of(n: int, hkv: int, x: Tensor) -> Tensor:
    return x[n].unflatten(1, (hkv, x.shape[2] // hkv)).movedim(0, 2)


def _keys_of(n: int, group: int, x: Tensor) -> Tensor:
    return x[n].transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _add_heads(total: Tensor, grad: Tensor, *, begins: bool) -> None:
    """Adds the gradient of every query head to the kv head it belongs to."""
    grad = grad[..., : total.shape[-1]]
    if total.stride(1) == 0 and total.shape[1] > 1:  # expanded: the heads share this memory
        total, grad = total[:, :1], grad.sum(1, keepdim=True, dtype=total.dtype)
    _add(total, grad, begins=begins)


def _add(total: Tensor, grad: Tensor, sign: int = 1, *, begins: bool = False) -> None:
    """Adds a gradient `[n h s w]` to a sum, of a narrower type some rows at a time; or writes it."""
    if begins or grad.dtype == total.dtype:
        put(total, grad, sign, begins=begins)
        return
    # torch copies all that it adds at once into the type of the sum: as much memory as the sum has.
    for part, share in zip(total.split(ADDED_ROWS, 2), grad.split(ADDED_ROWS, 2), strict=True):
        part.add_(share, alpha=sign)


def _how(rect: Rectangle, q: Tensor) -> tuple[bool, Tensor | None]:
    """(is_causal, attn_mask) of a rectangle."""
    if rect.band in (FULL, CAUSAL):
        return rect.band == CAUSAL, None
    height, width = rect.rows.stop - rect.rows.start, rect.cols.stop - rect.cols.start
    visible = visibility(rect.band, height, width, q.device)
    mask = torch.zeros(height, width, dtype=q.dtype, device=q.device)
    return False, mask.masked_fill_(~visible, float("-inf"))


def _as_the_op_wants(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in one width, contiguous and aligned, and in float32 in place of float16.

    The op reads memory as if the last stride were 1, and its float16 backward ran at 5 GFLOP/s where
    its float32 one ran at 55 (one thread, torch 2.13). Vectors of one element, rows that share memory, and
    on AMD's CPUs rows that do not begin at multiples of 16 bytes, it multiplies in another order, which bits
    would show.
    """
    # docs/design.md: rows are aligned
    tensors = tuple(x.float() if x.dtype == torch.float16 else x for x in tensors)
    elements = ALIGNED // tensors[0].element_size()
    width = -(-max(x.shape[-1] for x in tensors) // elements) * elements
    for x in tensors:
        if x.shape[-1] < width:
            x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
        yield x if _is_aligned(x, width) else x.clone(memory_format=torch.contiguous_format)


def _is_aligned(x: Tensor, width: int) -> bool:
    """Whether every row begins at a multiple of 16 bytes, and shares memory with no other."""
    # What has no content has no address, and begins as memory does.
    starts = (
        x.data_ptr() if x.device.type == "cpu" else 0,
        *(x.element_size() * s for s in x.stride()[:-1]),
    )
    return x.stride(-1) == 1 and x.stride(1) >= width and all(s % ALIGNED == 0 for s in starts)
