"""`workspace` measures what torch's attention on CPU allocates inside of one call.

The op is run on small tensors with the same strides under the profiler. What it takes grows with rows and
with columns in straight lines, once both are longer than its tiles: so three runs tell of any length.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from seqpar_kernels.torch_internals import CPU_FLASH, allocated, attention_ops

OPS = attention_ops(CPU_FLASH)
# By op, which of its tensors have the length of the queries ("q") and which that of the keys ("k").
LENGTHS = dict(zip(OPS, ("qkk", "qqkkqq"), strict=True))
LONG = {"q": 768, "k": 512}  # from which on the tiles of torch 2.13 do not grow
SEQUENCE = 2  # of `[b h s w]`

_Form = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # of a tensor: shape, strides, type


def workspace(op: Any, args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Counts the bytes inside of an op at its fullest moment, beside what it gives back; 0 for other ops.

    Args:
        op, args, options: the call; its tensors may be without content.
    """
    op = getattr(op, "overloadpacket", op)
    if op not in OPS:
        return 0
    tensors = [x for x in args if isinstance(x, Tensor)]
    whole = dict(zip(LENGTHS[op], (x.shape[SEQUENCE] for x in tensors), strict=False))
    flags = tuple(x for x in args if not isinstance(x, Tensor))
    masked = options.get("attn_mask") is not None

    def measured(lengths: dict[str, int]) -> int:
        forms = (_cut(x, lengths[which]) for x, which in zip(tensors, LENGTHS[op], strict=True))
        return _measured(op, tuple(forms), flags, masked, torch.get_num_threads())

    short = {which: min(length, LONG[which]) for which, length in whole.items()}
    base = measured(short)
    slopes = (
        (measured(short | {which: 2 * LONG[which]}) - base) * (length - LONG[which]) / LONG[which]
        for which, length in whole.items()
        if length > LONG[which]
    )
    return base + round(sum(slopes))


def _cut(x: Tensor, length: int) -> _Form:
    """The form of a tensor with this length, whose dims are as close or as far from each other."""
    shape, strides = list(x.shape), list(x.stride())
    shape[SEQUENCE] = length
    dims = sorted((n for n, stride in enumerate(x.stride()) if stride), key=lambda n: x.stride()[n])
    for inner, dim in zip(dims, dims[1:], strict=False):
        is_dense = x.stride()[dim] == x.stride()[inner] * x.shape[inner]
        strides[dim] = strides[inner] * (shape[inner] if is_dense else shape[inner] + 1)
        if x.stride()[dim] < x.stride()[SEQUENCE] or dim == SEQUENCE:
            strides[dim] = x.stride()[dim]
    return tuple(shape), tuple(strides), x.dtype


# The number of threads is there for the cache: what the op allocates depends on it.
@lru_cache(maxsize=1024)
def _measured(
    op: Any, forms: tuple[_Form, ...], flags: tuple[Any, ...], masked: bool, _num_threads: int
) -> int:
    tensors = [_zeros(*form) for form in forms]
    lengths = dict(zip(LENGTHS[op], (x.shape[SEQUENCE] for x in tensors), strict=False))
    mask = torch.zeros(lengths["q"], lengths["k"], dtype=tensors[0].dtype) if masked else None
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        given = op(*tensors, *flags, attn_mask=mask, scale=1.0)
    held = list(accumulate((size for _, size in allocated(profiled)), initial=0))
    # Until here what the op gave is alive, so the last is its size and not counted inside.
    del given
    return max(held) - held[-1]


def _zeros(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return torch.zeros(size, dtype=dtype).as_strided(shape, strides)
