"""`attend` and `attend_backward`: one block of query rows over one block of key rows.

Every strategy calls these two and nothing else; here an implementation is chosen and launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels import aten, reference
from seqpar_kernels.band import Band
from seqpar_kernels.partial import Partial, accumulation_dtype
from seqpar_kernels.score import Score

Implementation = Literal["reference", "aten"]
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rows:
    """What the backward of some query rows needs to know of the whole attention.

    `delta` is rowsum(out * dout), `lse` the natural log of the sum over *all* keys. `out` is here
    for kernels that insist on computing delta themselves; the two always agree.
    """

    q: Float[Tensor, "b i hq d"]
    out: Float[Tensor, "b i hq vd"]
    dout: Float[Tensor, "b i hq vd"]
    lse: Float[Tensor, "b i hq"]
    delta: Float[Tensor, "b i hq"]

    @staticmethod
    def of(q: Tensor, out: Tensor, dout: Tensor, lse: Tensor) -> Rows:
        """The rows of `q` with their delta."""
        wide = accumulation_dtype(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            delta = torch.einsum("bihd,bihd->bih", out.to(wide), dout.to(wide))
        return Rows(q, out, dout, lse, delta)

    def __getitem__(self, rows: slice) -> Rows:
        """A view of some rows."""
        return Rows(*(x[:, rows] for x in (self.q, self.out, self.dout, self.lse, self.delta)))


def attend(
    q: Float[Tensor, "b i hq d"],
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    band: Band,
    score: Score,
    *,
    into: Partial,
    implementation: Implementation | None = None,
) -> None:
    """Attends one block of query rows over one block of key rows and continues `into`, in place.

    Row i sees column j iff `i + band.lower <= j <= i + band.upper`. A row that sees nothing leaves
    `into` as it was, so masked blocks and empty tensors are legal and exact.

    Args:
        score: with its scale resolved.
        into: the running sums of these rows, float32 or wider; never normalised between blocks.
        implementation: `None` chooses by device and dtype, see `choose`.

    Raises:
        ValueError: hq is not a multiple of hkv.
        NotImplementedError: the implementation cannot serve this device or dtype.
    """
    if _nothing_to_do(q, k, band):
        return
    with torch.autocast(q.device.type, enabled=False):
        if choose(q.device, q.dtype, implementation) == "aten":
            aten.forward(q, k, v, band, score.factor, into)
        else:
            reference.forward(q, k, v, band, score.factor, into)


def attend_backward(
    rows: Rows,
    k: Float[Tensor, "b j hkv d"],
    v: Float[Tensor, "b j hkv vd"],
    band: Band,
    score: Score,
    *,
    into: tuple[Tensor, Tensor, Tensor],
    implementation: Implementation | None = None,
) -> None:
    """Adds the block's share of (dq, dk, dv) to `into`, in place.

    Args:
        rows: the query rows with lse and delta over *all* their keys, not just this block's.
        into: dq `[b i hq d]`, dk `[b j hkv d]`, dv `[b j hkv vd]`, float32 or wider.

    Raises:
        ValueError: hq is not a multiple of hkv.
        NotImplementedError: the implementation cannot serve this device or dtype.
    """
    q = rows.q
    if _nothing_to_do(q, k, band):
        return
    with torch.autocast(q.device.type, enabled=False):
        if choose(q.device, q.dtype, implementation) == "aten":
            aten.backward(q, k, v, rows.out, rows.dout, rows.lse, band, score.factor, into)
        else:
            reference.backward(
                q, k, v, rows.dout, rows.lse, rows.delta, band, score.factor, into
            )  # fmt: skip


def choose(
    device: torch.device, dtype: torch.dtype, requested: Implementation | None
) -> Implementation:
    """The implementation that serves tensors of this device and dtype.

    Raises:
        ValueError: no implementation has the requested name.
        NotImplementedError: the requested one cannot do it; the message names one that can.
    """
    if requested is not None and requested not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {IMPLEMENTATIONS} or None, got {requested!r}"
        )
    if dtype not in DTYPES:
        raise NotImplementedError(f"attention is computed in one of {DTYPES}, got {dtype}")
    if requested == "aten" and device.type != "cpu":
        raise NotImplementedError(
            f"implementation 'aten' runs on cpu tensors, got {device.type}; 'reference' runs there"
        )
    return requested or ("aten" if device.type == "cpu" else "reference")


def _nothing_to_do(q: Tensor, k: Tensor, band: Band) -> bool:
    """Whether no row sees a key. Torch's CPU op dies of a division by zero on empty tensors."""
    hq, hkv = q.shape[2], k.shape[2]
    if q.shape[0] == 0 or hq == 0 or q.shape[1] == 0 or k.shape[1] == 0:
        return True
    if hkv == 0 or hq % hkv:
        raise ValueError(f"hq must be a multiple of hkv, got {hq=} {hkv=} (q {tuple(q.shape)})")
    return band.count(q.shape[1], k.shape[1]) == 0
