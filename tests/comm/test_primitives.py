"""Every primitive is the transpose of its dual: <f(x), y> = <x, f^T(y)>, summed over ranks.

A failure here and not in the strategies' tests means that a primitive and its dual are wrong in the
same way somewhere the strategies do not go.
"""

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqpar import Group, simulate
from seqpar.comm import (
    AllToAll,
    Count,
    GatherSchedule,
    HomeSum,
    PackedMessage,
    Piece,
    RingSchedule,
    RingSum,
    all_gather,
    all_reduce,
    gather_pass,
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
    exchange = AllToAll(
        group, (places,) * 2, (split.q, split.kv), (split.hq, split.hkv), (None,) * 2
    )
    (q0, q1), (k0, k1) = split.q[group.rank], split.kv[group.rank]
    rows = [(2, layout.rows[group.rank], split.hq, 3), (2, layout.rows[group.rank], split.hkv, 4)]
    heads = [(2, length, q1 - q0, 3), (2, length, k1 - k0, 4)]
    if back:
        return inner(lambda ys: heads_to_rows(ys, exchange), heads, rows, group)
    return inner(lambda xs: rows_to_heads(xs, exchange), rows, heads, group)


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


def repeated_pair(group, length, hkv, per):
    """Kv heads repeated for every query head of a rank: their gradients are one for each of those."""
    layout, split = LAYOUTS["striped"](length, group.size), split_heads(hkv * per, hkv, group.size)
    places = tuple(layout.places(r) for r in range(group.size))
    exchange = AllToAll(group, (places,), (split.kv,), (split.hkv,), (split.q,))
    rows, num_q = (2, layout.rows[group.rank], hkv, 3), split.num_q(group.rank)
    return inner(lambda xs: rows_to_heads(xs, exchange), [rows], [(2, length, num_q, 3)], group)


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_repeated_heads_and_their_gradients_are_duals(length, hkv, per, size):
    total(simulate(size, repeated_pair, length, hkv, per))


def ring_pair(group, rows, wanted, direction, in_order):
    """What ring_pass brings and what RingSum sums; a visitor appends its digit to the sum, or adds it."""
    schedule = RingSchedule(group.rank, rows, lambda v, o: (v, o) in wanted, direction)
    block = normal(group, 1, rows[group.rank], 1, 2), normal(group, 1, rows[group.rank], 1)
    like = (block[0],)
    sums = RingSum(like, schedule, group, in_order=in_order)
    seen = []
    for owner, visiting in ring_pass(block, schedule, group):
        with sums.share() as share:
            assert (share is None) == (visiting is None)
            if visiting is not None:
                seen.append((owner, tuple(x.clone() for x in visiting)))
                if sums.begins:
                    share[0].zero_()
                share[0].mul_(10 if in_order else 1).add_(group.rank + 1)
    (home,) = sums.home()
    return block, seen, home, group.traffic.by_primitive


def check_ring(results, wanted, direction, in_order):
    size = len(results)
    rows = [block[0].shape[1] for block, *_ in results]
    for rank, (block, seen, home, _) in enumerate(results):
        path = [(rank - step * direction) % size for step in range(size)]
        assert [o for o, _ in seen] == [o for o in path if o == rank or (rank, o) in wanted]
        for owner, visiting in seen:
            assert all(torch.equal(x, y) for x, y in zip(visiting, results[owner][0], strict=True))
        visitors = [(rank + step * direction) % size for step in range(size)]
        visitors = [v for v in visitors if v == rank or (v, rank) in wanted]
        if block[0].numel():
            assert set(home.unique().tolist()) == {
                expected_sum(visitors, direction, size, in_order)
            }
    # A block is sent once to each rank that wants it, and its sum comes back once from each of them; in
    # order, with the owner's share, which goes to the first of its neighbours besides.
    blocks = sum(rows[o] for v, o in wanted if v != o)
    begun = sum(rows[o] for o in range(size) if ((o + direction) % size, o) in wanted and size > 1)
    assert total_sent(results, "ring_pass") == 3 * blocks
    assert total_sent(results, "ring_sum") == 2 * (blocks + begun * in_order)


def total_sent(results, primitive):
    """Elements that all ranks sent."""
    counts = (sent.get(primitive, Count()) for *_, sent in results)
    return sum(count.elements for count in counts)


def expected_sum(visitors, direction, size, in_order):
    """Chains of neighbours append their digits in turn; where one breaks, another sum begins."""
    if not in_order:
        return sum(v + 1 for v in visitors)
    chains = [[visitors[0]]]
    for v in visitors[1:]:
        if v == (chains[-1][-1] + direction) % size:
            chains[-1].append(v)
        else:
            chains.append([v])
    return sum(int("".join(str(v + 1) for v in chain)) for chain in chains)


RINGS = st.integers(1, 6).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, 5), min_size=size, max_size=size),
        st.sets(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))),
    )
)


@given(RINGS, st.sampled_from([1, -1]), st.booleans())
@example(([1] * 4, {(v, o) for v in range(4) for o in range(4)}), 1, False)
@example(([2, 0, 3], {(1, 0), (2, 0), (2, 1)}), 1, True)
@example(([1] * 5, {(0, 1), (1, 0), (4, 0), (0, 4)}), -1, True)
def test_the_ring_brings_what_is_wanted_and_sums_every_share(ring, direction, in_order):
    rows, wanted = ring
    results = simulate(len(rows), ring_pair, rows, wanted, direction, in_order)
    check_ring(results, wanted, direction, in_order)


def in_turn_pair(group, cuts, wanted):
    """What each rank holds of each owner in turn, of pieces that are cut alike on all ranks."""
    blocks = [
        tuple(Piece(o, a, b) for a, b in zip(cuts, cuts[1:], strict=False))
        for o in range(group.size)
    ]
    schedule = GatherSchedule.in_turn(
        group.rank, blocks, lambda r, p: (r, p.owner, p.start) in wanted
    )
    block = (normal(group, 2, cuts[-1], 1, 2),)
    sums, seen = HomeSum(block, schedule, group), []
    for held, (x,) in gather_pass(block, schedule, group):
        seen.append((held, x.clone()))
        with sums.share() as (share,):
            share.fill_(group.rank + 1)
    return block[0], seen, sums.home()[0], [step.sent for step in schedule.steps]


def test_pieces_that_follow_on_one_another_are_one_message():
    # Rank 1 wants all of rank 0, rank 2 its first and last piece, rank 0 nothing of anybody.
    wanted = {(1, 0, 0), (1, 0, 2), (1, 0, 3), (2, 0, 0), (2, 0, 3)}
    results = simulate(3, in_turn_pair, [0, 2, 3, 7], wanted)
    assert results[0][3] == [[], [(1, Piece(0, 0, 7))], [(2, Piece(0, 0, 2)), (2, Piece(0, 3, 7))]]
    assert results[1][3] == results[2][3] == [[], [], []]
    of_first = results[0][0]
    assert results[1][1][1][0] == (Piece(0, 0, 7),)
    assert torch.equal(results[1][1][1][1], of_first)
    assert results[2][1][2][0] == (Piece(0, 0, 2), Piece(0, 3, 7))
    assert torch.equal(results[2][1][2][1], of_first[:, [0, 1, 3, 4, 5, 6]])
    sums = [int(x) for x in results[0][2][0, :, 0, 0]]
    assert sums == [1 + 2 + 3] * 2 + [1 + 2] + [1 + 2 + 3] * 4


def pieces_pair(group, rows, num_chunks, wanted):
    """What gather_pass brings and what HomeSum sums: every holder adds its rank + 1 to a piece."""
    pieces = [Piece(o, n * c // num_chunks, n * (c + 1) // num_chunks)
              for c in range(num_chunks) for o, n in enumerate(rows)]  # fmt: skip
    chunks = [pieces[c * len(rows) : (c + 1) * len(rows)] for c in range(num_chunks)]

    def due(n, rank):  # in chunk n something else for every rank
        return chunks[(n + rank) % num_chunks]

    schedule = GatherSchedule(
        group.rank, group.size, num_chunks, lambda n: due(n, group.rank),
        lambda n: [(r, p) for r in range(group.size) for p in due(n, r) if p.owner == group.rank],
        lambda r, p: (r, p.owner) in wanted,
    )  # fmt: skip
    block = (normal(group, 2, rows[group.rank], 1, 2),)
    sums = HomeSum(block, schedule, group)
    seen = []
    for held, (x,) in gather_pass(block, schedule, group):
        seen.append((held, x.clone()))
        with sums.share() as (share,):
            share.fill_(group.rank + 1)
    home = sums.home()[0]
    mine = [due(n, group.rank) for n in range(num_chunks)]
    return block[0], seen, home, mine, group.traffic.by_primitive


@given(RINGS, st.integers(1, 3))
def test_pieces_reach_who_wants_them_and_shares_come_home(ring, num_chunks):
    rows, wanted = ring
    check_pieces(simulate(len(rows), pieces_pair, rows, num_chunks, wanted), wanted)


def check_pieces(results, wanted):
    for rank, (block, seen, home, chunks, _) in enumerate(results):
        for n, (held, x) in enumerate(seen):
            want = [p for p in chunks[n] if p.owner == rank or (rank, p.owner) in wanted]
            assert list(held) == want
            if want:
                assert torch.equal(x, torch.cat([results[p.owner][0][:, p.rows] for p in want], 1))
        holders = [r for r in range(len(results)) if r == rank or (r, rank) in wanted]
        if block.numel():
            assert set(home.unique().tolist()) == {sum(r + 1 for r in holders)}
    pieces = sum(results[o][0].shape[1] for r, o in wanted if r != o)
    assert total_sent(results, "gather") == total_sent(results, "scatter") == 4 * pieces


@given(
    st.lists(st.sampled_from([torch.float64, torch.float32]), min_size=1, max_size=4),
    st.integers(1, 3), st.integers(0, 4), st.integers(1, 3),
)  # fmt: skip
def test_messages_are_unpacked_as_they_were_packed(dtypes, batch, rows, heads):
    block = tuple(
        torch.randn((batch, rows, heads) + (n,) * (n > 0), dtype=dtype)
        for n, dtype in enumerate(dtypes)
    )
    message = PackedMessage.of(block)
    messages = message.pack(block)
    assert len(messages) == len(set(dtypes))
    assert all(m.is_contiguous() for m in messages)
    for x, y in zip(block, message.unpack(messages), strict=True):
        torch.testing.assert_close(y, x, rtol=0, atol=0)


def test_large_tensors_travel_as_they_are_and_small_ones_together():
    shapes = (1, 64, 2, 8), (1, 64, 2, 8), (1, 64, 2), (1, 64, 2)
    block = tuple(torch.randn(shape) for shape in shapes)
    many = 1 + (256 << 10) // (2 * 8 * 4)  # rows of which a wide tensor is more than 256 KiB
    message = PackedMessage.of(block, many)
    messages = message.pack(block)
    assert message.groups == ((0,), (1,), (2, 3))
    assert [m.shape[-1] for m in messages] == [8, 8, 2]
    assert [m.data_ptr() for m in messages[:2]] == [x.data_ptr() for x in block[:2]]
    for x, y in zip(block, message.unpack(messages), strict=True):
        assert torch.equal(x, y)
    assert [x.shape for x in message.empty(block[0], 3, 1, 2)] == [(3, 1, 2, 8)] * 2 + [
        (3, 1, 2, 2)
    ]
    assert PackedMessage.of(block, many - 1).groups == ((0, 1, 2, 3),)
    none = tuple(x[:, :0] for x in block)
    assert PackedMessage.of(none, many) == message, "a rank without rows knows as much"
    batch = tuple(torch.cat([x, x]) for x in block)
    assert PackedMessage.of(batch, many).groups == ((0, 1, 2, 3),), "of a batch rows are not first"
    assert len(message.of_sums().groups) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_reductions_are_duals(size):
    check_reduce(simulate(size, reduce_pairs))


@pytest.mark.parametrize("rows", [[3], [2, 3], [1, 0, 4], [0, 0, 2, 1, 1]])
def test_all_of_it_over_processes(worlds, rows):
    run = functools.partial(worlds.run, len(rows))
    total(run(gather_pair, rows))
    total(run(scatter_pair, rows))
    check_reduce(run(reduce_pairs))
    everything = {(v, o) for v in range(len(rows)) for o in range(len(rows))}
    some = {(v, o) for v, o in everything if (v + 2 * o) % 3}
    for wanted in (everything, some):
        for direction, in_order in ((1, False), (1, True), (-1, True)):
            results = run(ring_pair, rows, wanted, direction, in_order)
            check_ring(results, wanted, direction, in_order)
        check_pieces(run(pieces_pair, rows, 2, wanted), wanted)


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
