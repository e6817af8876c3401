"""The message in which query rows travel in backward, packed and unpacked here alone."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from seqpar_kernels import Implementation, Rows, needs_out


def row_message(rows: Rows, implementation: Implementation | None) -> tuple[Tensor, ...]:
    """The tensors that backward needs of some query rows; `out` only for kernels that derive delta."""
    out = (rows.out,) if needs_out(implementation) else ()
    return rows.q, rows.dout, rows.lse, rows.delta, *out


def rows_of(message: Iterable[Tensor], *, lse_learns: bool) -> Rows:
    """The rows of a message that has arrived."""
    q, dout, lse, delta, *out = message
    return Rows(q, out[0] if out else dout, dout, lse, delta, lse_learns)


def row_bytes(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    """Bytes of one row of each of the tensors `[b sl h (w)]`, in this type or their own."""
    return sum(x.shape[0] * prod(x.shape[2:]) * (dtype or x.dtype).itemsize for x in tensors)
