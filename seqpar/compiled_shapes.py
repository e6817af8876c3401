"""What a compiled call gives, where sizes are symbols of the compiler.

The strategy is run without content on sizes that are primes, and each stands for one symbol. They are found
again in the shapes and strides of what it gives: one graph serves all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor

from seqpar.calls.invariance import is_invariant
from seqpar.layout import Layout, Mask, Span
from seqpar.strategies import STRATEGIES, Plan
from seqpar_kernels import TABLES, Request

# As arguments of an op.
LENGTHS = "SymInt length, SymInt at_hand, SymInt kv_length, SymInt kv_at_hand"
# Larger than the heads and widths of models, and far enough apart for one to be a part of the next.
_BATCH, _OWN, _AT_HAND, _WHOLE = 10007, (20011, 20021), (40009, 40013), (80021, 80039)


def lengths_of(plan: Plan) -> list[int]:
    """The lengths that the shapes of a call depend on, besides those of its own rows; compilers trace this.

    Of queries, then of keys: all positions, and those that a rank has between the exchanges of a hybrid.
    """
    strategy = STRATEGIES[plan.strategy]
    if not (strategy.exchanges_heads or strategy.stores_scores):
        return [0, 0, 0, 0]  # shapes of own rows say all
    found = []
    for layout in (plan.layout, plan.keys):
        rows = [layout.rows[rank] for rank in _inner(plan)]
        found += [layout.length, layout.length if len(rows) == plan.group.size else sum(rows)]
    return found


def _inner(plan: Plan) -> tuple[int, ...]:
    """The ranks that this one exchanges heads with, itself included."""
    if not STRATEGIES[plan.strategy].exchanges_heads:
        return (plan.group.rank,)
    if plan.grid is None:
        return tuple(range(plan.group.size))
    row, _ = plan.grid.index_of(plan.group.rank)
    return tuple(plan.grid.members[row])


@dataclass(frozen=True)
class Outline:
    """A call on sizes that stand for its own.

    Args:
        plan: of the call, whose layouts are stand-ins.
        shapes: of q, k and v.
    """

    plan: Plan
    shapes: tuple[tuple[int, ...], ...]
    _symbols: tuple[tuple[int, Any], ...]

    @staticmethod
    def of(
        q: Tensor, k: Tensor, v: Tensor, plan: Plan, lengths: Sequence[Any], *, in_order: bool
    ) -> Outline:
        """The outline of a call.

        Args:
            plan: read without its layouts.
            lengths: as `lengths_of` gives them.
            in_order: as `is_in_order` gives it.
        """
        symbols: list[tuple[int, Any]] = [(_BATCH, q.shape[0])]
        for n, x in enumerate((q, k)):
            whole, at_hand = lengths[2 * n : 2 * n + 2]
            symbols += [(_OWN[n], x.shape[1]), (_AT_HAND[n], at_hand), (_WHOLE[n], whole)]
        shapes = tuple(
            (_BATCH, _OWN[min(n, 1)], int(x.shape[2]), int(x.shape[3]))
            for n, x in enumerate((q, k, v))
        )
        layout, keys = (_stand_in(plan, n, in_order=in_order) for n in range(2))
        # Biases are as long as the call, and change no shape.
        score = plan.score.resolve(shapes[0][3]).with_tensors(dict.fromkeys(TABLES))
        plan = replace(plan, layout=layout, kv_layout=keys, score=score, mask=Mask())
        request = Request.of(q, v, (*score.terms, *plan.terms))
        invariant = is_invariant(plan, request)
        return Outline(replace(plan.outline(), invariant=invariant), shapes, tuple(symbols))

    def stand_ins(self, *like: Tensor) -> tuple[Tensor, ...]:
        """q, k and v of the sizes that stand for theirs."""
        return tuple(x.new_empty(shape) for x, shape in zip(like, self.shapes, strict=True))

    def real(self, x: Tensor) -> Tensor:
        """A tensor like one that the outline gave, of the sizes that were stood for."""
        shape, stride = ([self._size(n) for n in sizes] for sizes in (x.shape, x.stride()))
        return x.new_empty_strided(shape, stride)

    def _size(self, n: int) -> Any:
        size: Any = 1
        for prime, symbol in self._symbols:
            while n and n % prime == 0:
                n, size = n // prime, size * symbol
        return size * n


def is_in_order(plan: Plan) -> bool:
    """Whether a rank that is alone has its rows in the order of positions; compilers trace this."""
    return plan.group.size > 1 or (plan.layout.is_in_order and plan.keys.is_in_order)


def _stand_in(plan: Plan, n: int, *, in_order: bool) -> Layout:
    """A layout in which this rank, it and the inner ranks, and all ranks have rows that stand for theirs.

    Args:
        n: 0 for queries, 1 for keys.
    """
    group, inner = plan.group, _inner(plan)
    rows = [0] * group.size
    rows[group.rank], at_hand = _OWN[n], _OWN[n]
    # Where nobody is between, the rows of one stand for those of the other.
    beside = [rank for rank in inner if rank != group.rank]
    beyond = [rank for rank in range(group.size) if rank not in inner]
    for ranks, total in ((beside, _AT_HAND[n]), (beyond, _WHOLE[n])):
        if ranks:
            rows[ranks[0]], at_hand = total - at_hand, total
    ends = [0, *accumulate(rows)]
    spans: list[tuple[Span, ...]] = [(Span(a, b - a),) for a, b in pairwise(ends)]
    if not in_order:
        spans[0] = (Span(1, ends[-1] - 1), Span(0, 1))
    return Layout("stand-in", ends[-1], group.size, tuple(spans))
