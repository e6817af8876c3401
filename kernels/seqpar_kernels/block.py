"""`Block`: where a block of scores lies and what is done to it; `Rows`: what a backward needs of its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqpar_kernels.band import Band
from seqpar_kernels.choice import Implementation
from seqpar_kernels.documents import Documents
from seqpar_kernels.dropout import Dropout
from seqpar_kernels.partial import accumulation_dtype
from seqpar_kernels.row_softmax import add_dot_
from seqpar_kernels.score import Score

# dq `[b i hq d]`, dk `[b j hkv d]`, dv `[b j hkv vd]`, float32 or wider, that a backward adds to. `None`
# is not wanted: dq, or both dk and dv.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Block:
    """A block of scores. Its row i is position `row + i * step`, its column j `col + j * step`.

    Positions matter to ALiBi, documents and dropout only; without them a band says all.

    Args:
        band: what the rows see of the columns.
        score: of the block's query heads, with the scale resolved.
        head: the place of the block's first query head among those of the whole attention.
        dropout: of the weights, or `None`.
        documents: of the whole sequence, or `None` if it is one.
    """

    band: Band
    score: Score
    row: int = 0
    col: int = 0
    step: int = 1
    head: int = 0
    dropout: Dropout | None = None
    documents: Documents | None = None

    def at(self, row: int, col: int) -> Block:
        """The block whose corner is (row, col) of this one."""
        return replace(
            self,
            band=self.band.at(row, col),
            row=self.row + row * self.step,
            col=self.col + col * self.step,
        )

    def row_limits(self, i: int, j: int, device: torch.device) -> Int[Tensor, "i 2"] | None:
        """Per row, the range of columns in its document."""
        if self.documents is None:
            return None
        return self.documents.limits(self.row, i, self.col, j, self.step, device)

    def col_limits(self, i: int, j: int, device: torch.device) -> Int[Tensor, "j 2"] | None:
        """Per column, the range of rows in its document."""
        if self.documents is None:
            return None
        return self.documents.limits(self.col, j, self.row, i, self.step, device)


@dataclass(frozen=True)
class Rows:
    """What the backward of some query rows needs to know of the whole attention.

    `delta` is rowsum(out * dout), less the gradient of lse if that is differentiated; `lse` is the natural
    log of the sum over *all* keys and the sink. `out` is here for kernels that insist on computing delta
    themselves, which is impossible where `lse_learns`; elsewhere the two agree.
    """

    q: Float[Tensor, "b i hq d"]
    out: Float[Tensor, "b i hq vd"]
    dout: Float[Tensor, "b i hq vd"]
    lse: Float[Tensor, "b i hq"]
    delta: Float[Tensor, "b i hq"]
    lse_learns: bool = False

    @staticmethod
    def of(
        q: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        dlse: Float[Tensor, "b i hq"] | None = None,
        *,
        implementation: Implementation | None = None,
    ) -> Rows:
        """The rows of `q` with their delta, given the gradient of lse if that is differentiated."""
        delta = torch.zeros(lse.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
        dout = dout if dout.stride(-1) == 1 or dout.shape[-1] == 1 else dout.contiguous()
        add_dot_(out, dout, delta, implementation=implementation)
        if dlse is not None:
            delta -= dlse
        return Rows(q, out, dout, lse, delta, lse_learns=dlse is not None)

    def __getitem__(self, rows: slice) -> Rows:
        """A view of some rows."""
        names = ("q", "out", "dout", "lse", "delta")
        return replace(self, **{name: getattr(self, name)[:, rows] for name in names})
