"""Shards are cut at multiples of a tile's length, whatever the layout."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from seqpar.layout import LAYOUTS, Layout, Span, contiguous, striped, zigzag

KINDS = st.sampled_from(list(LAYOUTS))


@given(KINDS, st.integers(0, 200), st.integers(1, 9), st.integers(1, 40))
def test_blocks_are_dealt_whole_as_positions_are(kind, length, size, multiple):
    """The layout of the blocks is the layout of as many positions."""
    layout = LAYOUTS[kind](length, size, multiple_of=multiple)
    of_blocks = LAYOUTS[kind](-(-length // multiple), size)
    for rank in range(size):
        expected = [
            p
            for block in of_blocks.positions(rank).tolist()
            for p in range(block * multiple, min(length, (block + 1) * multiple))
        ]
        assert layout.positions(rank).tolist() == expected
    assert layout.kind == kind
    assert layout.is_cut_at(multiple) or (kind, multiple) == ("striped", 1)


@given(KINDS, st.integers(1, 200), st.integers(1, 9), st.integers(2, 40))
def test_the_remainder_is_with_the_last_rows(kind, length, size, multiple):
    layout = LAYOUTS[kind](length, size, multiple_of=multiple)
    short = [r for r, rows in enumerate(layout.rows) if rows % multiple]
    last = next(r for r in range(size) if length - 1 in layout.positions(r))
    assert short == ([last] if length % multiple else [])


@given(KINDS, st.integers(0, 60), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
@example("striped", 3, 4, 1, 1)
def test_a_layout_knows_where_it_is_cut(kind, length, size, multiple, asked):
    layout = LAYOUTS[kind](length, size, multiple_of=multiple)
    neighbours = all(span.step == 1 for spans in layout.spans for span in spans)
    owner = {p: r for r in range(size) for p in layout.positions(r).tolist()}
    cuts = [p for p in range(1, length) if owner[p] != owner[p - 1]]
    assert layout.is_cut_at(asked) == (neighbours and all(p % asked == 0 for p in cuts))


def test_known_blocks():
    spans = contiguous(10, 3, multiple_of=4).spans
    assert spans == ((Span(0, 4),), (Span(4, 4),), (Span(8, 2),))
    assert zigzag(10, 2, multiple_of=2).spans == ((Span(0, 4), Span(8, 2)), (Span(4, 4),))
    spans = striped(10, 2, multiple_of=2).spans
    assert spans == ((Span(0, 2), Span(4, 2), Span(8, 2)), (Span(2, 2), Span(6, 2)))
    assert striped(10, 2).spans == ((Span(0, 5, 2),), (Span(1, 5, 2),))


def test_blocks_that_are_none_are_refused():
    for make in (
        *LAYOUTS.values(),
        lambda n, p, multiple_of: contiguous(n, p).is_cut_at(multiple_of),
    ):
        for wrong in (0, -2):
            with pytest.raises(
                ValueError, match="multiples of a positive number, got multiple_of="
            ):
                make(8, 2, multiple_of=wrong)
        for wrong in (2.0, "2", True):
            with pytest.raises(TypeError):
                make(8, 2, multiple_of=wrong)
    assert not Layout("own", 4, 2, ((Span(0, 2, 2),), (Span(1, 2, 2),))).is_cut_at(1)
