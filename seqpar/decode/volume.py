"""`decode_volume` counts what a rank sends to attend a sharded cache."""

from __future__ import annotations

from seqpar.comm import Count, combine_elements
from seqpar.strategies import Shape
from seqpar_kernels import accumulation_dtype


def decode_volume(num_queries: int, rank: int, size: int, shape: Shape) -> Count:
    """Counts what `rank` of `size` sends in one `KVCache.attend`, however long the sequence is.

    There are n = b * num_queries * hq rows of heads. To be merged, about (P-1)/P n (vd + 1) elements of out
    and lse are sent, in float32 (float64); then (P-1)/P n vd of the result, in the type of q. `append`,
    `truncate` and `reorder` send nothing.
    """
    parts, merged = combine_elements(shape.batch * num_queries * shape.hq, rank, size)
    elements = parts * (shape.vd + 1), merged * shape.vd
    sizes = accumulation_dtype(shape.dtype).itemsize, shape.dtype.itemsize
    return Count(sum(elements), sum(n * size for n, size in zip(elements, sizes, strict=True)))
