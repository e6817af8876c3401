"""`Case`: one attention problem, small enough to send to a worker and to print when it fails."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from seqpar.comm import Grid, Group
from seqpar.layout import LAYOUTS, Layout, Mask, Span, balanced, contiguous
from seqpar.layout.mask_arguments import Align
from seqpar.layout.shards import MakeLayout
from seqpar.strategies import STRATEGIES, Plan
from seqpar.testing import expressions, oracle
from seqpar.testing.budget import Budget
from seqpar.testing.expressions import Expression, made
from seqpar_kernels import Dropout, Implementation, Score

NAMES = ("out", "dq", "dk", "dv")
SEED = 2**40 + 5  # of dropout


def unsorted(length: int, size: int, *, multiple_of: int = 1) -> Layout:
    """Rank r holds runs r, r + size and r + 2 * size of 3 * size, the last one first, and an empty one."""
    runs = contiguous(length, 3 * size, multiple_of=multiple_of).spans
    spans = ((*runs[r + 2 * size], Span(0, 0), *runs[r + size], *runs[r]) for r in range(size))
    return Layout("unsorted", length, size, tuple(spans))


def stepped(length: int, size: int, *, multiple_of: int = 1) -> Layout:  # noqa: ARG001 - of no run
    """Of every size + 1 positions rank r holds that at r + 1, and rank 0 after all of these those at 0."""
    step = size + 1
    first, *others = (Span(c, len(range(c, length, step)), step) for c in range(step))
    spans = tuple((span,) if r else (span, first) for r, span in enumerate(others))
    return Layout("stepped", length, size, spans)


# What `Layout` allows and no constructor makes: even one rank holds its rows out of order.
OWN: dict[str, MakeLayout] = {"unsorted": unsorted, "stepped": stepped}


@dataclass(frozen=True)
class Case:
    """Sizes, mask and type of a problem; its tensors are random, but always the same."""

    length: int
    hq: int = 4
    hkv: int = 4
    d: int = 16
    vd: int = 16
    batch: int = 1
    causal: bool = True
    window: int | tuple[int | None, int | None] | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    kind: str = "contiguous"
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    dropout: float = 0.0
    documents: Any = None  # boundaries, or a pair of them
    kv_length: int | None = None
    multiple_of: int = 1
    degree: int = 0  # which divisor of the number of ranks is the Ulysses degree of a grid
    invariant: bool | None = None
    align: Align = "top-left"
    shown: Expression | None = None  # in place of causal, window and documents
    by_row: tuple[Expression, ...] = ()  # in place of them, one for each batch entry
    bias: str | None = None  # which of b, h, i and j it has; it is the same for the others
    relative: tuple[str, int] | None = None  # which of b and h it has, and how far it reaches

    @property
    def names(self) -> tuple[str, ...]:
        """What the results are called: the usual four, and gradients of what is learned."""
        learned = (f"d{name}" for name in oracle.LEARNED if self.learned()[name] is not None)
        return (*NAMES, *learned)

    @property
    def mask(self) -> Mask | tuple[Mask, ...]:
        """The mask, as the package takes it."""
        align = None if self.kv_length is None else self.align
        if self.by_row:
            return tuple(made(each, align) for each in self.by_row)
        if self.shown is not None:
            return made(self.shown, align)
        return Mask(self.causal, self.window, self.documents, align)

    def layout(self, size: int) -> Layout:
        """The layout for a number of ranks."""
        return self._laid_out(self.length, size)

    def keys(self, size: int) -> Layout:
        """The layout of the keys."""
        return self._laid_out(self.length if self.kv_length is None else self.kv_length, size)

    def _laid_out(self, length: int, size: int) -> Layout:
        if self.kind in OWN:
            return OWN[self.kind](length, size, multiple_of=self.multiple_of)
        if self.kind == "balanced":
            return balanced(length, size, self.mask, multiple_of=self.multiple_of)
        return LAYOUTS[self.kind](length, size, multiple_of=self.multiple_of)

    def grid(self, group: Group) -> Grid:
        """The ranks in two dimensions."""
        divisors = [n for n in range(1, group.size + 1) if group.size % n == 0]
        return group.grid(ulysses=divisors[self.degree % len(divisors)])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout, whole, `[b s h d]`: normal numbers rounded to `dtype`."""
        generator = torch.Generator().manual_seed(0)
        n, m = self.length, self.length if self.kv_length is None else self.kv_length
        shapes = (n, self.hq, self.d), (m, self.hkv, self.d), (m, self.hkv, self.vd)
        q, k, v, dout = (
            torch.randn(self.batch, *s, dtype=torch.float64, generator=generator)
            for s in (*shapes, (n, self.hq, self.vd))
        )
        return tuple(x.to(self.dtype) for x in (q, k, v, dout))  # type: ignore[return-value]

    def learned(self) -> dict[str, Tensor | None]:
        """What learns in the score, or `None`, as the oracle calls it, in the type of sums."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(1)
        keys = self.length if self.kv_length is None else self.kv_length
        sizes = {"b": self.batch, "h": self.hq, "i": self.length, "j": keys}

        def numbers(dims: str, of: str, *last: int) -> Tensor:
            shape = [sizes[dim] if dim in dims else 1 for dim in of]
            return torch.randn(*shape, *last, generator=generator, dtype=torch.float64).to(dtype)

        slopes = torch.linspace(0.5, 0.01, self.hq, dtype=dtype) if self.alibi else None
        sinks = torch.linspace(-1.0, 2.0, self.hq, dtype=dtype) if self.sinks else None
        bias = None if self.bias is None else numbers(self.bias, "bhij")
        relative = None
        if self.relative is not None:
            dims, reach = self.relative
            relative = numbers(dims, "bh", 2 * reach + 1)
        return {"bias": bias, "relative": relative, "slopes": slopes, "sinks": sinks}

    def plan(
        self,
        group: Group,
        strategy: str,
        implementation: Implementation | None = None,
        device: str = "cpu",
    ) -> Plan:
        """The plan that solves this case on the ranks of a group; what is learned wants gradients."""
        learned = {
            name: None if x is None else x.to(device).requires_grad_()
            for name, x in self.learned().items()
        }
        score = Score(
            self.scale, self.softcap, learned["slopes"], learned["sinks"], bias=learned["bias"],
            relative_bias=learned["relative"],
        )  # fmt: skip
        dropout = Dropout(self.dropout, SEED) if self.dropout else None
        layout = self.layout(group.size)
        keys = None if self.kv_length is None else self.keys(group.size)
        grid = self.grid(group) if STRATEGIES[strategy].needs_grid else None
        return Plan(
            group, layout, self.mask, score, strategy=strategy, implementation=implementation,
            dropout=dropout, kv_layout=keys, invariant=self.invariant, grid=grid,
        )  # fmt: skip

    def terms(self) -> oracle.Terms:
        """The score, as the oracle takes it."""
        scale = 1 / math.sqrt(self.d) if self.scale is None else self.scale
        dropout = (self.dropout, SEED) if self.dropout else None
        keys = self.length if self.kv_length is None else self.kv_length
        masks = self.mask if isinstance(self.mask, tuple) else (self.mask,)
        compares = self.alibi or self.relative is not None
        matters = compares or any(m.depends_on_place for m in masks if m.pair is None)
        apart = keys - self.length if matters and self.align == "bottom-right" else 0
        row, col = torch.arange(self.length) + max(apart, 0), torch.arange(keys) + max(-apart, 0)
        terms = oracle.Terms(scale, self.softcap, dropout=dropout, row=row, col=col)
        return replace(terms, **self.learned())  # type: ignore[arg-type]

    def visible(self) -> Tensor:
        """True where a row sees a column, `[s skv]` or `[b 1 s skv]`, straight from the definition."""
        lengths = self.length, self.length if self.kv_length is None else self.kv_length
        if self.by_row:
            by_row = [expressions.visible(each, *lengths, self.align) for each in self.by_row]
            return torch.stack(by_row).unsqueeze(1)
        if self.shown is not None:
            return expressions.visible(self.shown, *lengths, self.align)
        return oracle.visible(
            self.length, self.causal, self.window, self.documents, self.kv_length, self.align
        )

    def budget(self) -> Budget:
        """What the results must be, and how far from it they may be."""
        return Budget.of(*self.tensors(), self.visible(), self.terms())
