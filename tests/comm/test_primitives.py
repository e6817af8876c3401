"""Every primitive is the transpose of its dual: <f(x), y> = <x, f^T(y)>, summed over ranks.

A failure here and not in the strategies' tests means that a primitive and its dual are wrong in the
same way somewhere the strategies do not go.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpar import Group, simulate
from seqpar.comm import (
    HeadTrade,
    RingSum,
    all_gather,
    all_reduce,
    heads_to_rows,
    reduce_scatter,
    replicate,
    ring_pass,
    rows_to_heads,
)
from seqpar.layout import LAYOUTS, split_heads


def normal(group, *shape):
    generator = torch.Generator().manual_seed(1000 + group.rank)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def inner(fn, shapes_in, shapes_out, group):
    """(<f(x), y>, <x, grad>) of this rank: their sums over ranks must be equal."""
    xs = [normal(group, *s).requires_grad_() for s in shapes_in]
    ys = fn(xs)
    cotangents = [normal(group, *s) for s in shapes_out]
    assert [y.shape for y in ys] == [c.shape for c in cotangents]
    grads = torch.autograd.grad(ys, xs, cotangents)
    there = sum((y.detach() * c).sum() for y, c in zip(ys, cotangents, strict=True))
    back = sum((x.detach() * g).sum() for x, g in zip(xs, grads, strict=True))
    return float(there), float(back)


def gather_pair(group, rows):
    n = rows[group.rank]
    return inner(
        lambda x: [all_gather(x[0], group, rows, 1)], [(2, n, 3)], [(2, sum(rows), 3)], group
    )


def scatter_pair(group, rows):
    n = rows[group.rank]
    return inner(
        lambda x: [reduce_scatter(x[0], group, rows, 1)], [(2, sum(rows), 3)], [(2, n, 3)], group
    )


def heads_pair(group, kind, length, hkv, per, back):
    layout, split = LAYOUTS[kind](length, group.size), split_heads(hkv * per, hkv, group.size)
    places = tuple(layout.places(r) for r in range(group.size))
    trade = HeadTrade(group, places, (split.q, split.kv), (split.hq, split.hkv))
    (q0, q1), (k0, k1) = split.q[group.rank], split.kv[group.rank]
    rows = [(2, layout.rows[group.rank], split.hq, 3), (2, layout.rows[group.rank], split.hkv, 4)]
    heads = [(2, length, q1 - q0, 3), (2, length, k1 - k0, 4)]
    if back:
        return inner(lambda ys: heads_to_rows(ys, trade), heads, rows, group)
    return inner(lambda xs: rows_to_heads(xs, trade), rows, heads, group)


def total(pairs):
    there, back = (sum(p[i] for p in pairs) for i in (0, 1))
    assert there == pytest.approx(back, rel=1e-12, abs=1e-12)


ROWS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


@given(ROWS, st.booleans())
def test_gather_and_scatter_are_duals(rows, is_gather):
    pair = gather_pair if is_gather else scatter_pair
    total(simulate(len(rows), pair, rows))


@given(
    st.sampled_from(list(LAYOUTS)), st.integers(0, 20), st.integers(1, 4), st.integers(1, 3),
    st.booleans(), st.integers(1, 6),
)  # fmt: skip
def test_rows_and_heads_are_duals(kind, length, hkv, per, back, size):
    total(simulate(size, heads_pair, kind, length, hkv, per, back))


def reduce_pairs(group):
    # Summed and replicated tensors are one tensor seen by all ranks: it counts once.
    x, y = normal(group, 4).requires_grad_(), torch.arange(4.0, dtype=torch.float64)
    (dx,) = torch.autograd.grad(all_reduce(x, group), x, y)
    shared = torch.arange(3.0, dtype=torch.float64).requires_grad_()
    dy = normal(group, 3)
    (dshared,) = torch.autograd.grad(replicate(shared, group), shared, dy)
    return x.detach(), dx, dy, dshared


def check_reduce(results):
    for x, dx, dy, dshared in results:
        del x, dy
        assert torch.equal(dx, torch.arange(4.0, dtype=torch.float64))
        torch.testing.assert_close(dshared, sum(r[2] for r in results))


def ring_pair(group, rows):
    """What ring_pass brings is every rank's block; what RingSum sums is every rank's share."""
    block = normal(group, 1, rows[group.rank], 2)
    sums = RingSum(group, rows)
    seen = []
    for owner, (visiting,) in ring_pass((block,), group, rows):
        seen.append((owner, visiting.clone()))
        sums.add(owner, (visiting * (group.rank + 1),))
    (home,) = sums.home()
    return block, seen, home, group.traffic.by_primitive


def check_ring(results, rows):
    size = len(rows)
    for rank, (block, seen, home, sent) in enumerate(results):
        assert [o for o, _ in seen] == [(rank - step) % size for step in range(size)]
        for owner, visiting in seen:
            assert torch.equal(visiting, results[owner][0])
        torch.testing.assert_close(home, block * sum(range(1, size + 1)))
        counted = {name: count.elements for name, count in sent.items()}
        visits, returns = sum(rows) - rows[(rank + 1) % size], sum(rows) - rows[rank]
        expected = {"ring_pass": 2 * visits, "ring_sum": 2 * returns}
        assert counted == {name: n for name, n in expected.items() if n}


@given(ROWS)
def test_the_ring_brings_every_block_and_sums_every_share(rows):
    check_ring(simulate(len(rows), ring_pair, rows), rows)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_reductions_are_duals(size):
    check_reduce(simulate(size, reduce_pairs))


@pytest.mark.parametrize("rows", [[3], [2, 3], [1, 0, 4], [0, 0, 2, 1, 1]])
def test_all_of_it_over_processes(worlds, rows):
    run = functools.partial(worlds.run, len(rows))
    total(run(gather_pair, rows))
    total(run(scatter_pair, rows))
    check_reduce(run(reduce_pairs))
    check_ring(run(ring_pair, rows), rows)


@settings(max_examples=10)
@given(
    st.sampled_from(list(LAYOUTS)),
    st.integers(0, 9),
    st.integers(1, 2),
    st.integers(1, 5),
    st.booleans(),
)
def test_rows_and_heads_over_processes(worlds, kind, length, hkv, size, back):
    total(worlds.run(size, heads_pair, kind, length, hkv, 2, back))


def test_bool_is_not_summed():
    with pytest.raises(TypeError, match="bool"):
        simulate(2, lambda group: all_reduce(torch.ones(2, dtype=torch.bool), group))


def test_counts_of_a_reduction_are_those_of_a_ring():
    def fn(group):
        all_reduce(torch.ones(6, dtype=torch.bfloat16), group)
        return group.traffic.total

    assert [(c.elements, c.bytes) for c in simulate(3, fn)] == [(8, 16)] * 3
    assert Group.alone().traffic.total.elements == 0
