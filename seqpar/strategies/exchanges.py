"""`Exchanges`: which rows and heads the ranks of Ulysses exchange, chunk by chunk; integers and no tensor.

They follow from the layouts, the grid and the number of heads, so they are made once for calls of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from seqpar.comm import (
    AllToAll,
    AsyncExchange,
    Group,
    Places,
    Ranges,
    start_to_heads,
    start_to_rows,
)
from seqpar.layout import Layout, held, joined, split_heads, whole
from seqpar.strategies.head_chunks import Cut, Run, packed
from seqpar.strategies.plan import Plan


@dataclass(frozen=True, eq=False)
class Exchanges:
    """The exchanges of one rank, chunk after chunk: all of a call that its kind decides, and no tensor.

    Args:
        group: the ranks that exchange heads.
        outer: those that hold the rest of the sequence.
        layout, keys: of the rows between the exchanges.
        at_q, at_k: by rank of the group, where its rows then are.
        repeats: by rank, the query heads for each of which a kv head is at hand once.
        runs: by chunk, what this rank attends.
        moves: whether anything is exchanged, or put in another order.
    """

    cut: Cut
    group: Group
    outer: Group
    layout: Layout
    keys: Layout
    at_q: tuple[Places, ...]
    at_k: tuple[Places, ...]
    repeats: Ranges | None
    runs: list[list[Run]]
    moves: bool

    @staticmethod
    def of(plan: Plan, hq: int, hkv: int, *, in_order: bool) -> Exchanges:
        """Those of a plan, for so many heads."""
        grid = plan.group.grid(ring=1) if plan.grid is None else plan.grid
        (i, j), size = grid.index_of(plan.group.rank), grid.shape[1]
        layout, at_q = _merged(plan.layout, grid.members)
        keys, at_k = _merged(plan.keys, grid.members)
        cut = Cut.of(split_heads(hq, hkv, size), plan.head_chunks if size > 1 else 1)
        return Exchanges(
            cut,
            grid.ulysses,
            Group.alone() if grid.shape[0] == 1 else grid.ring,
            layout,
            keys,
            at_q[i],
            at_k[i],
            cut.heads.q if in_order and cut.heads.replicates else None,
            [list(cut.runs(chunk, j, in_order=in_order)) for chunk in range(len(cut.q))],
            size > 1 or any(map(_moves, (*at_q[i], *at_k[i]))),
        )

    def there(self, chunk: int, xs: Sequence[Tensor]) -> AsyncExchange:
        """Begins to bring q of a chunk, and k and v if they go with it, to where they are attended."""
        return start_to_heads(xs, self._there[chunk, len(xs)])

    def back(self, chunk: int, ys: Sequence[Tensor]) -> AsyncExchange:
        """Begins to bring out of a chunk, and lse if it is there, to where its rows are."""
        return start_to_rows(ys, self._back[chunk, len(ys)])

    @cached_property
    def _there(self) -> dict[tuple[int, int], AllToAll]:
        """By chunk and number of tensors: q alone, or q, k and v."""
        cut, places = self.cut, (self.at_q, self.at_k, self.at_k)
        repeats = (None, self.repeats, self.repeats)
        return {
            (chunk, n): self._all_to_all(
                tuple(packed(x, chunk) for x in (cut.q, cut.kv, cut.kv)[:n]),
                places[:n],
                repeats[:n],
            )
            for chunk in range(len(cut.q))
            for n in ((1, 3) if chunk < len(cut.kv) else (1,))
        }

    @cached_property
    def _back(self) -> dict[tuple[int, int], AllToAll]:
        """By chunk and number of tensors: out, or out and lse."""
        return {
            (chunk, n): self._all_to_all(
                (packed(self.cut.q, chunk),) * n, (self.at_q,) * n, (None,) * n
            )
            for chunk in range(len(self.cut.q))
            for n in (1, 2)
        }

    def _all_to_all(
        self,
        ranges: tuple[Ranges, ...],
        places: tuple[tuple[Places, ...], ...],
        repeats: tuple[Ranges | None, ...],
    ) -> AllToAll:
        num_heads = tuple(max(stop for _, stop in by_rank) for by_rank in ranges)
        return AllToAll(self.group, places, ranges, num_heads, repeats)


def _merged(
    layout: Layout, members: Sequence[Sequence[int]]
) -> tuple[Layout, tuple[tuple[Places, ...], ...]]:
    """The layout in which the ranks of each row are one, their rows in the order of positions."""
    if len(members) == 1:
        return whole(layout.length), (tuple(layout.places(rank) for rank in members[0]),)
    all_spans, all_places = [], []
    for ranks in members:
        rows = [
            (span, n, at) for n, rank in enumerate(ranks) for at, span in held(layout.spans[rank])
        ]
        # Rows of a single rank stay in its own order, so that nothing is moved for it.
        if len(ranks) > 1:
            rows.sort(key=lambda row: row[0].start)
        places: list[list[tuple[slice, slice]]] = [[] for _ in ranks]
        for (place, _), (_, n, at) in zip(held([s for s, _, _ in rows]), rows, strict=True):
            places[n].append((at, place))
        all_spans.append(joined(span for span, _, _ in rows))
        by_row = (sorted(p, key=lambda pair: pair[0].start) for p in places)
        all_places.append(tuple(tuple(p) for p in by_row))
    merged = Layout(layout.kind, layout.length, len(members), tuple(all_spans))
    return merged, tuple(all_places)


def _moves(places: Places) -> bool:
    """Whether any row lies elsewhere in the sequence than on its rank."""
    return any((at.start, at.stop) != (place.start, place.stop) for at, place in places)
