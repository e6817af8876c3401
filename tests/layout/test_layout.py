"""Layouts partition the sequence, tiles show each score once, heads are dealt completely."""

from dataclasses import replace
from itertools import permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar.layout import (
    CAUSAL,
    LAYOUTS,
    Layout,
    Mask,
    Span,
    Tile,
    joined_tiles,
    split_heads,
    tiles,
    work,
    zigzag,
)
from seqpar.testing import oracle
from seqpar_kernels import Band

KINDS = st.sampled_from(list(LAYOUTS))


@given(KINDS, st.integers(0, 200), st.integers(1, 12))
def test_every_position_is_held_once(kind, length, size):
    layout = LAYOUTS[kind](length, size)
    held = [layout.positions(r).tolist() for r in range(size)]
    assert sorted(p for positions in held for p in positions) == list(range(length))
    assert layout.rows == tuple(map(len, held))
    assert max(layout.rows) - min(layout.rows) <= (2 if kind == "zigzag" else 1)


@given(KINDS, st.integers(0, 200), st.integers(1, 12))
def test_the_permutation_and_the_places_restore_the_order(kind, length, size):
    layout = LAYOUTS[kind](length, size)
    x = torch.arange(length)
    permuted = x[layout.permutation()]
    assert torch.equal(permuted[layout.inverse()], x)
    restored = torch.full((length,), -1)
    for rank, shard in enumerate(permuted.split(list(layout.rows))):
        for local, place in layout.places(rank):
            restored[place] = shard[local]
    assert torch.equal(restored, x)


def test_known_layouts_are_what_their_names_say():
    assert [LAYOUTS["contiguous"](7, 3).positions(r).tolist() for r in range(3)] == [
        [0, 1, 2], [3, 4], [5, 6],
    ]  # fmt: skip
    assert [zigzag(8, 2).positions(r).tolist() for r in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [LAYOUTS["striped"](5, 2).positions(r).tolist() for r in range(2)] == [[0, 2, 4], [1, 3]]
    assert len(zigzag(8, 2).spans[1]) == 1, "neighbouring runs are one span"
    assert repr(zigzag(8, 2)) == "Layout(kind='zigzag', length=8, size=2)"


@pytest.mark.parametrize("joins", [False, True])
@given(
    kind=KINDS,
    length=st.integers(1, 60),
    size=st.integers(1, 7),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 62),
)
def test_tiles_show_every_visible_score_once(joins, kind, length, size, causal, window):
    layout, mask = LAYOUTS[kind](length, size), Mask(causal=causal, window=window)
    seen = torch.zeros(length, length, dtype=torch.int)
    for rank in range(size):
        for owner in range(size):
            rows, cols = layout.positions(rank), layout.positions(owner)
            apart = tiles(layout.spans[rank], layout.spans[owner], mask, *mask.layers)
            for t in joined_tiles(apart) if joins else apart:
                for i, row in enumerate(rows[t.rows].tolist()):
                    assert joins or row == t.row + i * t.step
                    for j in t.band.columns(i, t.cols.stop - t.cols.start):
                        assert joins or cols[t.cols][j] == t.col + j * t.step
                        seen[row, cols[t.cols][j]] += 1
    assert torch.equal(seen, oracle.visible(length, causal, window).int())
    assert sum(work(layout, mask)) == int(seen.sum())


@pytest.mark.parametrize("kind", ["zigzag", "striped"])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8])
def test_the_busiest_rank_does_at_most_two_percent_more_than_the_mean(kind, size):
    loads = work(LAYOUTS[kind](8192, size), Mask(causal=True))
    assert max(loads) <= 1.02 * sum(loads) / size


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3), (1, 4)])
def test_in_a_zigzag_layout_all_tiles_of_a_mesh_are_as_much_work(shape):
    """Rows of one rank see as many keys of each other rank; of their own too, but for the diagonal."""
    rows, columns = shape
    layout, mask = zigzag(96 * rows * columns, rows * columns), Mask(causal=True)
    held = layout.spans
    seen = [
        sum(
            t.band.count(*t.shape)
            for r in range(i * columns, (i + 1) * columns)
            for c in range(j, rows * columns, columns)
            for t in tiles(held[r], held[c], mask, *mask.layers)
        )
        for i in range(rows)
        for j in range(columns)
    ]
    # The diagonal of a rank's own rows is counted whole: half of a row more than half of the square.
    assert max(seen) - min(seen) <= layout.length


def test_a_zigzag_rank_meets_its_own_rows_in_one_causal_tile():
    for size in (2, 3, 4):
        own = zigzag(2048 * size, size).spans[0]
        (met,) = joined_tiles(tiles(own, own, Mask(causal=True), *CAUSAL))
        assert (met.rows, met.cols, met.band) == (slice(0, 2048), slice(0, 2048), Band(upper=0))


def test_a_zigzag_rank_meets_the_rows_of_another_in_one_full_tile():
    layout = zigzag(64, 4)
    for rank, owner in permutations(range(4), 2):
        (met,) = joined_tiles(
            tiles(layout.spans[rank], layout.spans[owner], Mask(causal=True), *CAUSAL)
        )
        height, width = met.shape
        assert met.band.is_full(height, width)
        assert height * width == 16 * 8


@pytest.mark.parametrize(("hkv", "group"), product(range(1, 6), range(1, 7)))
@pytest.mark.parametrize("size", range(1, 13))
def test_every_query_head_meets_its_kv_head_on_one_rank(hkv, group, size):
    split = split_heads(hkv * group, hkv, size)
    met = []
    for rank, ((q_start, q_stop), (kv_start, kv_stop)) in enumerate(
        zip(split.q, split.kv, strict=True)
    ):
        segments = list(split.segments(rank))
        assert len(segments) <= 3
        for s in segments:
            heads, kvs = range(q_start, q_stop)[s.q], range(kv_start, kv_stop)[s.kv]
            assert len(heads) % len(kvs) == 0
            each = len(heads) // len(kvs)
            met += [(h, kvs[n // each]) for n, h in enumerate(heads)]
    assert met == [(h, h // group) for h in range(hkv * group)]
    counts = [b - a for a, b in split.q]
    assert max(counts) - min(counts) <= 1
    assert split.replicates == (sum(b - a for a, b in split.kv) > hkv)


def test_wrong_requests_are_refused():
    for length, size in ((-1, 2), (4, 0)):
        for make in LAYOUTS.values():
            with pytest.raises(ValueError, match="length >= 0 and size >= 1"):
                make(length, size)
    assert Mask(documents=torch.tensor([0, 3, 7], dtype=torch.int32)).documents == (0, 3, 7)
    for window in (0, -3):
        with pytest.raises(ValueError, match="at least 1"):
            Mask(causal=True, window=window)
    for wrong in ({"window": 2.5}, {"window": True}, {"causal": "yes"}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            Mask(**wrong)
    for spans in (
        ((Span(0, 2),), (Span(1, 3),)),
        ((Span(0, 2),), (Span(1, 2, 2),)),
        ((Span(0, 2),), (Span(3, 1),)),
        ((Span(0, 4),), (Span(4, -1),)),
        ((Span(0, 3),), (Span(3, 2),)),
        ((Span(0, 2, 2),), (Span(0, 2, 2),)),
        ((), ()),
    ):
        with pytest.raises(ValueError, match="once"):
            Layout("own", 4, 2, spans)
    assert Layout("own", 4, 2, ((Span(2, 2),), (Span(0, 2),))).rows == (2, 2)
    with pytest.raises(TypeError, match=r"integers|int"):
        zigzag(8.0, 2)
    with pytest.raises(ValueError, match="as many lists"):
        Layout("own", 4, 2, ((Span(0, 4),),))
    with pytest.raises(ValueError, match="multiple of hkv"):
        split_heads(3, 2, 1)


def test_spans_may_be_out_of_order_and_those_without_positions_are_left_out():
    layout = Layout("own", 6, 2, ((Span(4, 2), Span(9, 0), Span(0, 1)), (Span(1, 3),)))
    assert layout.spans == ((Span(4, 2), Span(0, 1)), (Span(1, 3),))
    assert layout.rows == (3, 3)
    assert layout.positions(0).tolist() == [4, 5, 0]
    assert Layout.decoded(layout.code) == layout
    assert Layout("own", 2, 2, ((Span(0, 2),), (Span(0, 0),))).spans == ((Span(0, 2),), ())


@pytest.mark.parametrize("step", [0, -1])
def test_spans_that_do_not_go_upwards_are_refused(step):
    with pytest.raises(ValueError, match="in steps of at least 1, got Span"):
        Layout("own", 2, 1, ((Span(1, 2, step),),))


def test_hashes_are_the_same_in_every_process():
    """A pickled mask or layout brings its hash along; that of `None` is another in each, before 3.12."""
    assert hash(Mask(causal=True)) == hash((True, (-1, 0), (), 0, (), (), (0, 0)))
    other = Mask(window=3, documents=(0, 4, 9), align="bottom-right")
    assert hash(other) == hash((False, (2, 2), (0, 4, 9), 2, (), (9, 9), (0, 0)))
    assert hash(zigzag(9, 2)) == hash(zigzag(9, 2).spans) == zigzag(9, 2).fingerprint


def test_tiles_widen_only_to_the_right_and_down_to_the_same_row():
    left = Tile(slice(0, 4), slice(0, 4), Band(upper=0), 0, 0, 1)
    right = Tile(slice(2, 4), slice(4, 8), Band(), 2, 4, 1)
    assert not left.widens_to(right), "row 2 sees column 2 and none behind it"
    full = replace(left, band=Band())
    assert not full.widens_to(right), "rows 0 and 1 see none of the new columns"
    assert full.widens_to(replace(right, rows=slice(0, 4), row=0))
    assert not full.widens_to(replace(right, rows=slice(0, 4), cols=slice(5, 9), row=0))
    assert not full.widens_to(replace(right, rows=slice(0, 3), row=0))
    late = replace(left, band=Band(upper=2))  # row 2 sees column 4, the first of the new ones
    assert late.widens_to(replace(right, band=Band(upper=0)))
    assert not late.widens_to(replace(right, band=Band(upper=1)))


def test_tiles_continue_each_other_only_below_and_over_the_same_columns():
    above = Tile(slice(0, 4), slice(0, 4), Band(), 0, 0, 1)
    assert above.continues_as(replace(above, rows=slice(4, 8), row=4))
    assert not above.continues_as(replace(above, rows=slice(5, 8), row=5))
    assert not above.continues_as(replace(above, rows=slice(4, 8), cols=slice(4, 8), row=4))
    assert not above.continues_as(replace(above, rows=slice(4, 8), row=4, band=Band(upper=0)))
