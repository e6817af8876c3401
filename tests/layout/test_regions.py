"""Masks joined by `&` and `|`: the scores that they should show, in disjoint layers of one range a row."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqpar import Mask, balanced, masks
from seqpar.layout import Span, visible_count
from seqpar.layout.regions import joined_regions
from seqpar.layout.work import Work, cuts
from seqpar.testing import expressions
from seqpar.testing.drawn import examples
from seqpar.testing.drawn import expressions as drawn
from seqpar_kernels import FAR, Layer, Place, Ranges, Region

N = 24
PLACE = Place(torch.arange(N), torch.arange(N), 0)


@st.composite
def regions(draw):
    """One of up to nine rows and columns, between two diagonals, one, or none."""
    (top, height), (left, width) = (
        (draw(st.integers(0, 9)), draw(st.integers(1, 9))) for _ in range(2)
    )
    lower = draw(st.just(-FAR) | st.integers(-9, 9))
    upper = draw(st.just(FAR) | st.integers(-9, 9))
    return Region(top, top + height, left, left + width, lower, upper)


def shown(regions):
    """How often each score is shown, `[N N]`."""
    i, j = torch.arange(N)[:, None], torch.arange(N)
    count = torch.zeros(N, N, dtype=torch.long)
    for r in regions:
        inside = (i >= r.top) & (i < r.bottom) & (j >= r.left) & (j < r.right)
        count += inside & (j - i >= r.lower) & (j - i <= r.upper)
    return count


def is_one_range(line):
    at = line.nonzero().flatten()
    return len(at) == 0 or len(at) == at[-1] - at[0] + 1


LISTS = st.lists(regions(), max_size=4)


# Column 0 is seen by rows 0, 1 and 4, and not by those between; and a diagonal with rows that see nothing.
COME_BACK = [Region(0, 2, 0, 4), Region(2, 4, 2, 6), Region(4, 5, 0, 6)]
BROKEN = [Region(0, 3, 0, 9, 0, 0), Region(5, 8, 0, 9, 0, 0)]


@given(LISTS, LISTS, st.sampled_from(["and", "or", "less"]))
@settings(max_examples=examples(3))
@example(COME_BACK, [], "or")
@example(BROKEN, [], "or")
def test_layers_show_what_they_should_once(ours, theirs, how):
    keeps = {
        "and": lambda a, b: a and b,
        "or": lambda a, b: a or b,
        "less": lambda a, b: a and not b,
    }
    a, b = (shown(x) > 0 for x in (ours, theirs))
    want = {"and": a & b, "or": a | b, "less": a & ~b}[how]
    layers = joined_regions(ours, theirs, keeps[how])
    assert torch.equal(sum(map(shown, layers), torch.zeros_like(want.long())), want.long())
    for layer in layers:
        seen = shown(layer) > 0
        assert all(map(is_one_range, (*seen, *seen.T)))
        assert all(above.bottom <= below.top for above, below in pairwise(layer))
        assert torch.equal(Layer.of(layer).visible(PLACE), seen)
        assert torch.equal(Ranges(layer).by_columns.visible(PLACE), seen.T)


@given(drawn(N, packs=True), drawn(N, packs=True))
def test_the_order_of_masks_does_not_matter(one, other):
    a, b = expressions.made(one), expressions.made(other)
    assert a & b == b & a
    assert a | b == b | a


@given(drawn(N, packs=True), *[st.integers(0, 12)] * 4, st.integers(1, 5))
def test_counts_are_those_of_the_dense_mask(expression, row, num_rows, col, num_cols, step):
    mask = expressions.made(expression)
    rows, cols = Span(row, num_rows, step), Span(col, num_cols, step)
    length = max(N, rows.positions.stop, cols.positions.stop)
    seen = expressions.visible(expression, length, length)
    assert visible_count(mask, rows, cols) == int(seen[rows.positions][:, cols.positions].sum())


@given(drawn(N, packs=True))
def test_work_and_cuts_are_those_of_the_dense_mask(expression):
    mask, seen = expressions.made(expression), expressions.visible(expression, N, N)
    works = [Work(layer, N) for layer in mask.layers]
    for position in range(N + 1):
        assert sum(work.before(position) for work in works) == int(seen[:position].sum())
    whole = [
        p for p in range(N + 1) if not seen[:p, p:].any() and not seen[p:, :p].any()
    ]  # fmt: skip
    found = cuts([mask], N)
    assert set(found) <= set(whole)
    if mask.regions is None:
        assert set(whole) <= set(found) or mask.sides != (None, None)


@given(drawn(N, packs=True), st.integers(1, 5))
def test_balanced_shares_hold_every_row_of_any_mask(expression, size):
    mask = expressions.made(expression)
    layout = balanced(N, size, [mask, Mask(causal=True)])
    assert sorted(p for rank in range(size) for p in layout.positions(rank).tolist()) == [*range(N)]


@st.composite
def stairs(draw):
    """Rows of one or two runs, each end of which moves by a key or not from a row to the next."""
    seen = torch.zeros(draw(st.integers(1, 8)), 16, dtype=torch.bool)
    ends = sorted(draw(st.lists(st.integers(0, 8), min_size=2, max_size=4, unique=True)))
    for row in seen:
        for start, stop in zip(ends[::2], ends[1::2], strict=False):
            row[start:stop] = True
        ends = [x + draw(st.integers(0, 1)) for x in ends]
    return seen


@given(
    stairs()
    | st.builds(
        lambda bits, width: torch.tensor(bits).reshape(-1, width),
        st.lists(st.booleans(), min_size=24, max_size=24),
        st.sampled_from([1, 3, 6, 24]),
    )
)
@settings(max_examples=examples(3))
def test_a_dense_mask_shows_what_its_tensor_does(seen):
    """By regions or, where these are too many, by a function: a drawing tells no difference."""
    text = "\n".join("".join(".x"[int(x)] for x in row) for row in seen.tolist())
    assert masks.dense(seen).draw(*seen.shape) == text


def test_masks_of_one_meaning_have_the_same_layers():
    causal = Mask(causal=True)
    packed = Mask(causal=True, documents=(0, 3, 9))
    assert (causal & Mask(documents=(0, 3, 9))).layers == packed.layers
    assert (causal & Mask(window=4)).layers == Mask(causal=True, window=4).layers
    assert (causal | masks.band(upper=-1)).layers == causal.layers
    assert (causal & Mask()).layers == causal.layers
    assert (Mask() | causal).layers == Mask().layers
    assert masks.prefix_lm(0).layers == causal.layers
    assert (causal & masks.rectangle((4, 4))).layers == ()


def test_catalogues_take_few_layers():
    causal = Mask(causal=True)
    few = {
        1: [
            masks.prefix_lm(5), masks.prefix_lm([2, 3], (0, 9, 20)), masks.block_causal((0, 4, 9, 20)),
            causal | masks.spans([(3, 9), (11, 14)]), causal & masks.keys(5),
        ],
        2: [
            Mask(causal=True, window=4) | causal & masks.keys(0, 2), masks.shared_prompt(5, [3, 4, 2]),
            Mask(window=3) | masks.keys(0, 2),
        ],
    }  # fmt: skip
    for most, made in few.items():
        assert [len(mask.layers) for mask in made] == [most] * len(made)
    assert len((Mask(window=3) | masks.global_tokens([(0, 1), (9, 10)])).layers) <= 4


def test_a_mask_is_drawn():
    assert masks.prefix_lm(2).draw(4) == "xx..\nxx..\nxxx.\nxxxx"
    assert Mask(causal=True, align="bottom-right").draw(2, 4) == "xxx.\nxxxx"
    crossed = Mask(documents=((0, 1, 3), (0, 2, 3)))
    assert crossed.draw(3, 3) == "xx.\n..x\n..x"
    with pytest.raises(ValueError, match="there are 2 query and 4 key positions"):
        Mask(causal=True).draw(2, 4)


@pytest.mark.parametrize(("error", "match", "make"), [
    (ValueError, "must not end before it begins, got \\(5, 3\\)", lambda: masks.keys(5, 3)),
    (ValueError, "a start must not be negative", lambda: masks.spans([(-1, 3)])),
    (TypeError, "a stop must be an integer, got 2.5", lambda: masks.rectangle((0, 2.5))),
    (ValueError, "a segment goes on from one before it, got 1 for segment 1",
     lambda: masks.tree([2, 2], [None, 1])),
    (ValueError, "a parent for each of the 2 segments", lambda: masks.tree([2, 2], [None])),
    (ValueError, "a length must not be negative", lambda: masks.shared_prompt(3, [2, -1])),
    (ValueError, "size must be at least 1", lambda: masks.every(0, 4)),
    (ValueError, "blocks must be boundaries from 0", lambda: masks.block_causal((1, 4))),
    (ValueError, "back must not be negative", lambda: masks.block_causal((0, 4), back=-1)),
    (ValueError, "a prefix for each of the 2 documents", lambda: masks.prefix_lm([1], (0, 2, 4))),
    (TypeError, "upper must be an integer or None", lambda: masks.band(upper=1.0)),
    (ValueError, "same number of documents", lambda: Mask(documents=((0, 2, 4), (0, 4)))),
    (ValueError, "documents of keys must be boundaries from 0", lambda: Mask(documents=((0, 4), (0, 4, 2)))),
    (TypeError, "documents must be integer boundaries", lambda: Mask(documents=(0, 1.5))),
    (TypeError, "documents must be integer boundaries", lambda: Mask(documents=torch.tensor([0, 1.5]))),
    (ValueError, "same lengths to be joined",
     lambda: Mask(documents=(0, 4)) & Mask(documents=(0, 5))),
    (ValueError, "aligned alike to be joined",
     lambda: Mask(True, align="top-left") | Mask(True, align="bottom-right")),
    (ValueError, "document 1 has 2 query and 3 key positions",
     lambda: Mask(True, documents=((0, 2, 4), (0, 2, 5))) & Mask()),
    (ValueError, "one of the masks is for 4 query and 5 key positions",
     lambda: Mask(documents=((0, 2, 4), (0, 2, 5))) & Mask(True)),
    (ValueError, "one of the masks is for 2 query and 3 key positions",
     lambda: masks.dense(torch.ones(2, 3).bool()) | Mask(window=3)),
    (ValueError, "'bottom-right' counts keys from where the first row is",
     lambda: (Mask(True, align="bottom-right") & masks.keys(0, 3)).draw(8, 6)),
    (TypeError, "unsupported operand", lambda: Mask() & 3),
    (ValueError, "must show something in each of its rows", lambda: Mask(regions=((Region(4, 3),),))),
    (ValueError, "must show something", lambda: Mask(regions=((Region(0, 9, 0, 2, upper=-5),),))),
    (ValueError, "rows of a layer must follow",
     lambda: Mask(regions=((Region(0, 4, 0, 2), Region(3, 5, 2, 4)),))),
    (ValueError, "rows that are neighbours",
     lambda: Mask(regions=((Region(0, 2, 0, 2), Region(3, 5, 1, 4)),))),
    (ValueError, "must not overlap", lambda: Mask(regions=((Region(0, 4),), (Region(3, 5),)))),
    (ValueError, "regions are all of a mask", lambda: Mask(True, regions=((Region(0, 4),),))),
    (TypeError, "layers of seqpar_kernels.Region", lambda: Mask(regions=(((0, 4, 0, 4),),))),
])  # fmt: skip
def test_masks_that_mean_nothing_are_refused(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_no_layer_is_no_region():
    assert Mask(regions=[[], [Region(0, 2)]]).layers == (Layer(ranges=Ranges((Region(0, 2),))),)
    assert Mask(regions=[[]]).layers == ()


def test_much_that_nobody_sees_is_no_work():
    mask = masks.spans([(0, 10), (10**6, 10**6 + 5)])
    assert cuts([mask], 10**7) == [0, 10, 10**6, 10**6 + 5, 10**7]
    assert balanced(10**6, 4, mask).rows == (250_000,) * 4


def test_masks_are_of_the_host_wherever_tensors_are_made():
    with torch.device("meta"):
        mask = masks.prefix_lm(3)
        (layer,) = mask.layers
        limits = layer.ranges.limits(0, 5, 0, 5, 1, torch.device("cpu"))
    assert mask.numbers.device.type == limits.device.type == "cpu"
    assert limits.tolist() == [[0, 3], [0, 3], [0, 3], [0, 4], [0, 5]]


def test_boundaries_of_arrays_and_tensors_are_integers():
    for make in (list, torch.tensor, np.array):
        assert Mask(documents=make([0, 5])).documents == (0, 5)
        assert Mask(documents=(make([0, 2, 5]), make([0, 3, 4]))).pair == ((0, 2, 5), (0, 3, 4))
    assert Mask(documents=[torch.tensor(0), torch.tensor(5)]).documents == (0, 5)
    assert Mask(documents=((0, 5), (0, 5))) == Mask(documents=(0, 5))


def test_regions_that_are_layers_are_taken_as_they_are():
    for mask in (masks.prefix_lm(3), Mask(window=2) | masks.global_tokens([(4, 6)])):
        assert replace(mask, regions=tuple(tuple(layer) for layer in mask.regions)) == mask
