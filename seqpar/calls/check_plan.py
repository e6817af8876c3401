"""Whether a plan is legal, whatever its tensors."""

from __future__ import annotations

from typing import get_args

from seqpar.comm import Grid
from seqpar.layout import Layout, Mask, check_size
from seqpar.strategies.plan import Agree, Plan
from seqpar.strategies.registry import STRATEGIES
from seqpar_kernels import Dropout, Score
from seqpar_kernels.integers import is_integer


def check_plan(plan: Plan) -> None:
    """Raises where no call could have this plan."""
    masks = plan.given_masks
    named: list[tuple[str, object, type]] = [
        ("layout", plan.layout, Layout),
        ("keys", plan.keys, Layout),
    ]
    named += [("mask", mask, Mask) for mask in masks] + [("score", plan.score, Score)]
    if not masks:
        raise ValueError("there must be a mask for each batch entry, got none")
    for name, value, kind in named:
        if not isinstance(value, kind):
            name = name.replace("keys", "kv_layout")
            made = "; make one with seqpar.zigzag(length, group.size)" if kind is Layout else ""
            raise TypeError(f"{name} must be a seqpar.{kind.__name__}, got {value!r}{made}")
    if plan.dropout is not None and not isinstance(plan.dropout, Dropout):
        raise TypeError(f"dropout must be a seqpar.Dropout or None, got {plan.dropout!r}")
    if plan.invariant is not None and not isinstance(plan.invariant, bool):
        raise TypeError(f"invariant must be a bool or None, got {plan.invariant!r}")
    if plan.strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {tuple(STRATEGIES)}, got {plan.strategy!r}")
    if plan.agree not in get_args(Agree):
        raise ValueError(f"agree must be one of {get_args(Agree)}, got {plan.agree!r}")
    _check_layouts(plan)
    _check_grid(plan)
    _check_counts(plan)


def _check_layouts(plan: Plan) -> None:
    layout, keys, group = plan.layout, plan.keys, plan.group
    for each in (layout, keys):
        check_size(each, group.size)
    # docs/design.md: where rows stand over keys of another length is said
    if len({each.step for each in (layout, keys)} - {None}) > 1:
        raise ValueError(
            "queries and keys must be dealt in the same steps: both striped, or neither; "
            f"got {layout.kind} and {keys.kind}"
        )
    for mask in plan.masks:
        _check_lengths(mask, layout.length, keys.length)


def _check_lengths(mask: Mask, num_rows: int, num_cols: int) -> None:
    if mask.documents is not None and mask.pair is None and num_cols != num_rows == mask.bounds[-1]:
        raise ValueError(
            "documents are of one sequence, and queries and keys have another length, "
            f"{num_rows} and {num_cols}: give boundaries of both, documents=(of_queries, of_keys)"
        )
    ends = zip(mask.lengths or (), (num_rows, num_cols), ("sequence does", "keys do"), strict=False)
    for end, length, what in ends:
        if end != length:
            raise ValueError(
                f"a dense mask or documents must end where the {what}, at {length}, got {end}; "
                "seqpar.padded_documents makes a document of padding behind them"
            )


def _check_grid(plan: Plan) -> None:
    # docs/design.md: a strategy says what kind it is
    grid, needs = plan.grid, STRATEGIES[plan.strategy].needs_grid
    if needs and not isinstance(grid, Grid):
        raise TypeError(
            f"strategy {plan.strategy!r} takes a seqpar.Grid, got {grid!r}; make one with "
            "group.grid(ulysses=...)"
        )
    if grid is None:
        return
    if not needs:
        able = tuple(name for name, strategy in STRATEGIES.items() if strategy.needs_grid)
        raise ValueError(f"a grid is for {able}, got one for {plan.strategy!r}")
    ours, theirs = (
        (group.rank, group.transport.global_ranks) for group in (plan.group, grid.group)
    )
    if grid.group is not plan.group and (ours != theirs or plan.group.size != grid.group.size):
        raise ValueError(f"the grid must be of the group of the plan, {plan.group}, got {grid}")
    ranks = sorted(rank for row in grid.members for rank in row)
    if ranks != list(range(plan.group.size)) or len({len(row) for row in grid.members}) > 1:
        raise ValueError(
            f"the degrees of the grid must multiply to the {plan.group.size} ranks, got {grid}"
        )


def _check_counts(plan: Plan) -> None:
    for name, least in (("head_chunks", 1), ("first_head", 0)):
        number = getattr(plan, name)
        if not is_integer(number):
            raise TypeError(f"{name} must be an integer, got {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if plan.head_chunks > 1 and not STRATEGIES[plan.strategy].exchanges_heads:
        able = tuple(name for name, strategy in STRATEGIES.items() if strategy.exchanges_heads)
        raise ValueError(
            f"head_chunks is for {able}, which exchange heads; got {plan.head_chunks} for "
            f"{plan.strategy!r}"
        )
