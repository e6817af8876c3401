"""Visible scores of two spans are those of the dense mask, for any step and any documents."""

from hypothesis import example, given
from hypothesis import strategies as st

from seqpar.layout import LAYOUTS, Mask, Span, sees, visible_count
from seqpar.testing import oracle
from seqpar_kernels import Region


@st.composite
def documents(draw, most=40):
    """Boundaries: long, short and empty documents, and positions after the last of them."""
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 20]), max_size=14))
    bounds = [0]
    for n in lengths:
        bounds.append(min(most, bounds[-1] + n))
    return tuple(bounds)


FIELDS = st.fixed_dictionaries(
    {
        "causal": st.booleans(),
        "window": st.none() | st.integers(1, 42),
        "documents": st.none() | documents(),
    }
)


@given(FIELDS, *[st.integers(0, 20)] * 4, st.integers(1, 7))
@example({"causal": True, "documents": (0, 3, 3, 5)}, 0, 5, 0, 5, 1)
@example({"documents": (0, 1, 2, 3, 4)}, 0, 4, 2, 4, 1)
def test_counts_what_the_dense_mask_shows(fields, row, num_rows, col, num_cols, step):
    mask = Mask(**fields)
    rows, cols = Span(row, num_rows, step), Span(col, num_cols, step)
    length = max(rows.positions.stop, cols.positions.stop, 1)
    seen = oracle.visible(length, mask.causal, mask.window, mask.documents)
    expected = int(seen[rows.positions][:, cols.positions].sum()) if num_rows * num_cols else 0
    assert visible_count(mask, rows, cols) == expected
    assert sees(mask, rows, cols) == (expected > 0)


@given(FIELDS, st.sampled_from(list(LAYOUTS)), st.integers(1, 40), st.integers(1, 6))
def test_the_ranks_of_a_layout_count_every_score_once(fields, kind, length, size):
    mask = Mask(**fields)
    spans = [span for spans in LAYOUTS[kind](length, size).spans for span in spans]
    counted = sum(visible_count(mask, rows, cols) for rows in spans for cols in spans)
    assert counted == int(oracle.visible(length, mask.causal, mask.window, mask.documents).sum())


def test_documents_that_the_spans_do_not_share_are_not_visited(monkeypatch):
    visited = []
    within = Region.within
    monkeypatch.setattr(Region, "within", lambda *args: visited.append(args) or within(*args))
    mask = Mask(causal=True, documents=range(0, 100_001, 10))
    assert visible_count(mask, Span(50_000, 40), Span(49_980, 40)) == 2 * 55
    assert not sees(mask, Span(90_000, 10_000), Span(0, 90_000))
    assert sees(mask, Span(0, 100_000), Span(0, 100_000))
    assert len(visited) <= 2 + 2 + 1
