"""`Rows`: what a backward needs to know of its query rows; `RunningGradients`: what it adds to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from seqpar_kernels.choice import Implementation
from seqpar_kernels.finite import may_hold_poison
from seqpar_kernels.partial import accumulation_dtype
from seqpar_kernels.row_softmax import add_dot_
from seqpar_kernels.terms import Sums

# dq `[b i hq d]`, dk `[b j hkv d]`, dv `[b j hkv vd]`, float32 or wider, that a backward adds to. `None`
# is not wanted: dq, or both dk and dv.
RunningGradients = tuple[Tensor | None, Tensor | None, Tensor | None]
# By the name of a learned tensor, `[b i hq]` of what a backward adds each row's share of its gradient to.
Learned = Mapping[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """What the backward of some query rows needs to know of the whole attention.

    `delta` is rowsum(out * dout), less the gradient of lse if that is differentiated; `lse` is the natural
    log of the sum over *all* keys and what joins it in `finish`. `out` is here for kernels that insist on
    computing delta themselves, which is impossible where `lse_learns`; elsewhere the two agree.
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

    @cached_property
    def finite(self) -> bool:
        """Whether all that a backward multiplies is known to be finite."""
        return not may_hold_poison(self.q, self.dout, self.delta)

    def __getitem__(self, where: slice | tuple[slice, slice]) -> Rows:
        """A view of some rows, or of some batch entries and rows."""
        at = where if isinstance(where, tuple) else (slice(None), where)
        names = ("q", "out", "dout", "lse", "delta")
        return replace(self, **{name: getattr(self, name)[at] for name in names})


class Totals:
    """Sums of the gradients of tensors that are not shares of rows, one for each tensor."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.sums = sums_for(tensors)
        self._left = {id(x): total for x, total in self.sums}

    def take(self, x: Tensor) -> Tensor | None:
        """The gradient of a tensor, in its type: all of it where it is first asked for, then nothing."""
        total = self._left.pop(id(x), None)
        return None if total is None else total.to(x.dtype)


def sums_for(tensors: Iterable[Tensor]) -> Sums:
    """Each tensor once, with zeros to sum its gradient in."""
    once = {id(x): x for x in tensors}.values()
    wide = ((x, accumulation_dtype(x.dtype)) for x in once)
    return [(x, torch.zeros(x.shape, dtype=dtype, device=x.device)) for x, dtype in wide]
