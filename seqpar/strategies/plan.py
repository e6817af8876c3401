"""`Plan`: everything an attention call needs besides its tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, TypeVar

from torch import Tensor

from seqpar.comm import Grid, Group, Kept
from seqpar.layout import Layout, Mask, Span, Tile, tall_tiles, tiles
from seqpar_kernels import Block, Dropout, Implementation, Score, Term
from seqpar_kernels.terms.modifiers import Modifier

T = TypeVar("T")
Spans = tuple[Span, ...]
Agree = Literal["call", "plan"]
_DEFAULT = "default"
MOST_TILES = 64  # of two ranks that are kept: shards of many spans may meet in thousands


@dataclass(frozen=True, eq=False)
class Plan:
    """A frozen description of sharded attention.

    Making one checks nothing and sends nothing, so that a wrong plan on one rank cannot leave the
    others waiting: the call that uses it checks it together with its tensors, on all ranks.

    Args:
        group: the ranks that share the sequence.
        layout: which of them holds which positions.
        mask: what a position may see; or a mask for each batch entry, of which equal neighbours are attended
            together.
        score: what happens to q.k before the softmax.
        strategy: how the ranks work together: a name of `seqpar.strategies.STRATEGIES`.
        implementation: of the block math; `None` chooses by device, dtype and what is asked.
        dropout: of the attention weights; the same seed on every rank, another for every layer and step.
        kv_layout: of the keys and values, where they are another sequence than the queries; `None`: the
            layout of the queries. If it has another length, a mask says by `align` where rows stand.
        invariant: whether results, gradients included, must be the same bits for any number of ranks.
            What that asks of each strategy, and costs, is in docs/numerics.md. `None` is what holds
            without being asked for: True for Ulysses.
        grid: the ranks of the group in two dimensions, for the mesh and the hybrid.
        head_chunks: in how many chunks Ulysses and the hybrid exchange their heads: the next is exchanged
            while one is attended, so from three on buffers are smaller. The results are the same.
        first_head: which of the layer's query heads is the first of this call, where other ranks attend to
            the others: dropout then drops the same weights for any number of ranks.
        agree: "call": ranks compare every call, forward and backward, before they send. "plan": they
            compare the first call of its kind, and trust the others. What is then not seen is in
            docs/reliability.md: such ranks may wait for each other, or mix up their messages.
    """

    group: Group
    layout: Layout
    # Mask() and Score(): torch 2.11 compiles no function whose defaults are objects.
    mask: Mask | tuple[Mask, ...] = _DEFAULT  # type: ignore[assignment]
    score: Score = _DEFAULT  # type: ignore[assignment]
    strategy: str = "ring"
    implementation: Implementation | None = None
    dropout: Dropout | None = None
    kv_layout: Layout | None = None
    invariant: bool | None = None
    grid: Grid | None = None
    head_chunks: int = 1
    first_head: int = 0
    agree: Agree = "call"

    def __post_init__(self) -> None:
        for name, kind in (("mask", Mask), ("score", Score)):
            if isinstance(value := getattr(self, name), str) and value == _DEFAULT:
                object.__setattr__(self, name, kind())
        if isinstance(self.mask, list):
            object.__setattr__(self, "mask", tuple(self.mask))

    @property
    def keys(self) -> Layout:
        """The layout of the keys."""
        return self.layout if self.kv_layout is None else self.kv_layout

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """What is done besides the score, in any layer of the mask."""
        return (*(x for mask in self.masks for x in (*mask.terms, *mask.mods)), *self.dropping)

    @property
    def given_masks(self) -> tuple[Mask, ...]:
        """The masks by batch entry, or the one for all."""
        return self.mask if isinstance(self.mask, tuple) else (self.mask,)

    @cached_property
    def masks(self) -> tuple[Mask, ...]:
        """The masks that there are, each once."""
        return tuple(dict.fromkeys(self.given_masks))

    @cached_property
    def by_batch(self) -> tuple[tuple[slice, Mask], ...]:
        """(batch entries, mask) of neighbours that have the same mask; of all, if there is one for all."""
        if isinstance(self.mask, Mask):
            return ((slice(None), self.mask),)
        found, start = [], 0
        for mask, same in groupby(self.mask):
            stop = start + len(list(same))
            found.append((slice(start, stop), mask))
            start = stop
        return tuple(found)

    @property
    def functions(self) -> tuple[Modifier, ...]:
        """The functions of scores, which backward may ask again."""
        given = (self.score.score_mod, *(mask.mask_mod for mask in self.masks))
        return tuple(function for function in given if function is not None)

    @property
    def dropping(self) -> tuple[Term, ...]:
        """The dropout, if anything is dropped."""
        return (self.dropout,) if self.dropout is not None and self.dropout.acts else ()

    def kept(self, name: str, make: Callable[[], T], *more: Hashable) -> T:
        """What was made under this name for plans of these layouts, mask and grid, or is made now.

        Args:
            more: what else it depends on.
        """
        # docs/design.md: schedules are made once
        # The group by name: schedules may hold a view of it, and the grid's may be another than the plan's.
        grid = None if self.grid is None else (self.grid.group.name, self.grid.members)
        key = name, self.layout, self.kv_layout, self._shown, grid, *more
        return self.group.kept.get(key, make)

    @cached_property
    def _shown(self) -> tuple[Mask, ...]:
        """The masks by which schedules are made, by batch entry: without functions, which hold tensors."""
        return tuple(mask.bare for mask in self.given_masks)

    @cached_property
    def own(self) -> Kept:
        """What is made once for this very plan: it ends with it, so it may hold the group and the score."""
        return Kept()

    def is_as(self, other: Plan) -> bool:
        """Whether all that it says is what the other says, of the kinds that it should be of.

        Raises nothing: what a plan says is checked by the call, on all ranks.
        """
        pairs = ((getattr(self, name), getattr(other, name)) for name in _FIELDS)
        return all(
            x is y or (type(x) is type(y) and isinstance(x, _COMPARED) and x == y) for x, y in pairs
        )

    def __getstate__(self) -> dict[str, Any]:
        """What it says, and nothing that it decided: that is of this process."""
        return {name: getattr(self, name) for name in _FIELDS}

    def on(self, group: Group, tensors: Mapping[str, Tensor]) -> Plan:
        """The plan for another group of as many ranks, with other tensors in its score."""
        grid = None if self.grid is None else Grid(group, self.grid.members)
        return replace(self, group=group, grid=grid, score=self.score.with_tensors(tensors))

    def outline(self) -> Plan:
        """A plan of the same shapes for tensors without content, which drops nothing."""
        return replace(self, dropout=None, implementation="reference")

    def blocks(
        self, rows: Spans, cols: Spans, mask: Mask, score: Score, head: int, batch: int
    ) -> Iterator[tuple[slice, slice, Block]]:
        """Yields (rows, columns, block) where the query rows of some spans see the keys of others.

        Args:
            mask: of the batch entries at hand, of which `batch` is the first.
            score: of the heads at hand, resolved.
            head: which of the call's query heads is the first at hand.
        """
        # docs/design.md: a `Block` says everything but the tensors
        for n, layer in enumerate(mask.layers):
            terms = *layer.terms, *mask.mods, *self.dropping
            needs_positions = any(term.needs_positions for term in (*score.terms, *terms))
            # docs/design.md: tiles keep positions apart until joining is allowed
            made = tiles if needs_positions else tall_tiles
            known = self.kept(made.__name__, dict[tuple[Spans, Spans, Mask, int], tuple[Tile, ...]])
            if (met := known.get((rows, cols, mask.bare, n))) is None:
                met = made(rows, cols, mask, layer)
                if len(met) <= MOST_TILES:
                    known[rows, cols, mask.bare, n] = met
            for t in met:
                place = t.row, t.col, t.step, self.first_head + head, batch
                yield t.rows, t.cols, Block(t.band, score, *place, terms)


_FIELDS = tuple(field.name for field in fields(Plan))
_COMPARED = (Layout, Mask, tuple, Dropout, str, int, bool)
