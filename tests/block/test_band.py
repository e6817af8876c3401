"""Band arithmetic and its cut into rectangles, against the definition written out."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from seqpar_kernels import Band
from seqpar_kernels.rectangles import rectangles, strips
from seqpar_kernels.reference import visibility

SIZES = st.integers(0, 40)
OFFSETS = st.none() | st.integers(-50, 50)


def written_out(band, num_rows, num_cols):
    lower = -(10**9) if band.lower is None else band.lower
    upper = 10**9 if band.upper is None else band.upper
    rows = [[i + lower <= j <= i + upper for j in range(num_cols)] for i in range(num_rows)]
    return torch.tensor(rows, dtype=torch.bool).view(num_rows, num_cols)


@given(OFFSETS, OFFSETS, SIZES, SIZES)
def test_counts_what_the_definition_shows(lower, upper, num_rows, num_cols):
    band = Band(lower, upper)
    seen = written_out(band, num_rows, num_cols)
    assert band.count(num_rows, num_cols) == int(seen.sum())
    assert band.is_full(num_rows, num_cols) == bool(seen.all())
    assert torch.equal(visibility(band, num_rows, num_cols, torch.device("cpu")), seen)
    some = [i for i in range(num_rows) if seen[i].any()]
    assert list(band.rows(num_rows, num_cols)) == some
    for i in range(num_rows):
        assert list(band.columns(i, num_cols)) == seen[i].nonzero().flatten().tolist()


@given(OFFSETS, OFFSETS, SIZES, SIZES, SIZES, SIZES)
def test_a_corner_sees_the_same_band(lower, upper, num_rows, num_cols, row, col):
    whole = written_out(Band(lower, upper), row + num_rows, col + num_cols)
    corner = written_out(Band(lower, upper).at(row, col), num_rows, num_cols)
    assert torch.equal(corner, whole[row:, col:])


@given(
    OFFSETS, OFFSETS, st.integers(0, 700), st.integers(0, 700), st.sampled_from([None, 100, 384])
)
@example(lower=-255, upper=0, num_rows=700, num_cols=700, width=None)
@example(lower=-256, upper=255, num_rows=600, num_cols=300, width=384)
@example(lower=5, upper=300, num_rows=300, num_cols=20, width=None)
def test_rectangles_hold_every_visible_score_once(lower, upper, num_rows, num_cols, width):
    band = Band(lower, upper)
    count = torch.zeros(num_rows, num_cols, dtype=torch.int)
    parts = rectangles(band, num_rows, num_cols)
    if width:
        parts = strips(band, num_rows, num_cols, width) if num_cols else ()
    for part in parts:
        tile = count[part.rows, part.cols]
        seen = visibility(part.band, *tile.shape, torch.device("cpu"))
        assert seen.any(1).all(), f"a row of {part} sees nothing: its lse would be -inf"
        assert width is None or tile.shape[1] <= width
        tile += seen
    assert torch.equal(count, visibility(band, num_rows, num_cols, torch.device("cpu")).int())
