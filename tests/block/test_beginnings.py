"""Where sums hold nothing yet, the first share is written, and the rest becomes zero."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqpar_kernels import (
    Band,
    Block,
    Partial,
    Ranges,
    Rows,
    Score,
    attend,
    attend_backward,
    first_touches,
)
from seqpar_kernels.whole import attend_whole

NAN = float("nan")


def slices(length):
    ends = st.tuples(st.integers(0, length), st.integers(0, length))
    return st.lists(ends.map(lambda e: slice(min(e), max(e))), max_size=5)


@given(slices(9), st.booleans())
@example([slice(0, 9), slice(2, 4)], True)
@example([slice(2, 4), slice(4, 9), slice(3, 7)], True)
@example([slice(2, 4), slice(3, 9), slice(5, 7)], True)
@example([slice(1, 1), slice(0, 2), slice(0, 1)], True)
@example([slice(2, 6), slice(4, 4), slice(3, 5)], True)
@example([], True)
def test_a_sum_is_the_sum_of_what_comes_to_it(parts, begins):
    sums = [torch.full((2, 9, 3), NAN if begins else 1.0) for _ in range(2)]
    flags = first_touches(parts, sums[0], None, sums[1], begins=begins)
    assert len(flags) == len(parts)
    assert begins or not any(flags)
    due = torch.zeros(9) if begins else torch.ones(9)
    for n, (part, first) in enumerate(zip(parts, flags, strict=True)):
        due[part] += n + 1
        for x in sums:
            x[:, part] = n + 1 if first else x[:, part] + n + 1
    for x in sums:
        assert torch.equal(x, due[None, :, None].expand(2, 9, 3))


def test_what_covers_all_is_not_zeroed_before():
    """Nor is the part that it writes: that is what this is for."""
    x = torch.full((1, 6, 1), NAN)
    assert first_touches([slice(0, 4), slice(4, 6), slice(1, 3)], x, begins=True) == [
        True,
        True,
        False,
    ]
    assert x.isnan().all()
    assert first_touches([slice(1, 3)], x, begins=True) == [True]
    assert x[0, :, 0].isnan().tolist() == [False, True, True, False, False, False]
    assert first_touches([slice(0, 6)], None, begins=True) == [False]


PROBLEMS = {
    "band": st.builds(Band, st.none() | st.integers(-30, 5), st.none() | st.integers(-5, 30)),
    "sizes": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "heads": st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    "batch": st.sampled_from([1, 2]),
    "scale": st.sampled_from([0.3, -0.3, 0.0]),
    "bounds": st.none() | st.lists(st.integers(0, 40), max_size=3),
    "poisoned": st.booleans(),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LIBRARIES = [(name, dtype) for name in (None, "reference") for dtype in DTYPES]
TRITON = [("triton", dtype) for dtype in DTYPES[1:3]]


def problem(dtype, band, sizes, heads, batch, scale, bounds, poisoned):
    """q, k, v, dout and the block."""
    (i, j), (hq, hkv) = sizes, heads
    generator = torch.Generator().manual_seed(0)
    shapes = (i, hq, 8), (j, hkv, 8), (j, hkv, 6), (i, hq, 6)
    q, k, v, dout = (torch.randn(batch, *s, generator=generator).to(dtype) for s in shapes)
    documents = () if bounds is None else (Ranges.documents((0, *sorted(bounds))),)
    if poisoned:
        v[0, -1, 0, 0] = NAN
    return q, k, v, dout, Block(band, Score(scale), terms=documents)


def check_same(results, others):
    """Holds results to the same bits, NaN in the same places."""
    for x, y in zip(results, others, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize(("implementation", "dtype"), LIBRARIES + TRITON)
@settings(max_examples=12)
@given(**PROBLEMS)
@example(
    band=Band(None, 0),
    sizes=(40, 40),
    heads=(2, 2),
    batch=2,
    scale=-0.3,
    bounds=None,
    poisoned=False,
)
@example(
    band=Band(None, 0), sizes=(40, 3), heads=(2, 2), batch=1, scale=0.3, bounds=None, poisoned=True
)
@example(
    band=Band(None, -50),
    sizes=(9, 9),
    heads=(2, 2),
    batch=1,
    scale=0.3,
    bounds=None,
    poisoned=False,
)
def test_sums_begin_with_a_block_as_with_the_identity(implementation, dtype, **drawn):
    q, k, v, _, block = problem(dtype, **drawn)
    found = []
    for begins in (False, True):
        into = Partial.identity(q, v.shape[-1])
        if begins:
            for x in (into.acc, into.m, into.l):
                x.fill_(NAN)
        attend(q, k, v, block, into=into, implementation=implementation, begins=begins)
        found.append((into.acc, into.m, into.l))
    check_same(*found)


@pytest.mark.parametrize(("implementation", "dtype"), LIBRARIES)
@settings(max_examples=25)
@given(**PROBLEMS)
@example(
    band=Band(None, 0),
    sizes=(40, 40),
    heads=(2, 2),
    batch=2,
    scale=-0.3,
    bounds=None,
    poisoned=False,
)
@example(
    band=Band(2, 1), sizes=(7, 9), heads=(2, 2), batch=1, scale=0.3, bounds=None, poisoned=False
)
def test_gradients_are_those_that_are_added_to_zeros(implementation, dtype, **drawn):
    check_gradients(implementation, dtype, drawn)


@pytest.mark.parametrize(("implementation", "dtype"), TRITON)
@settings(max_examples=8)
@given(**PROBLEMS)
@example(
    band=Band(2, 1), sizes=(7, 9), heads=(4, 2), batch=1, scale=0.3, bounds=None, poisoned=True
)
@example(
    band=Band(None, -50),
    sizes=(9, 9),
    heads=(2, 2),
    batch=1,
    scale=0.3,
    bounds=None,
    poisoned=False,
)
def test_kernels_write_gradients_as_if_they_added_them_to_zeros(implementation, dtype, **drawn):
    check_gradients(implementation, dtype, drawn)


def check_gradients(implementation, dtype, drawn):
    q, k, v, dout, block = problem(dtype, **drawn)
    out, lse = attend_whole(q, k, v, block, implementation=implementation)
    rows = Rows.of(q, out, dout, lse, implementation=implementation)
    found = []
    for begins, content in (((False, False), 0.0), ((True, True), NAN)):
        into = tuple(torch.full(x.shape, content, dtype=lse.dtype) for x in (q, k, v))
        attend_backward(rows, k, v, block, into=into, implementation=implementation, begins=begins)
        found.append(into)
    check_same(*found)
    # One of them may begin where the other goes on.
    contents = zip((q, k, v), (1.0, NAN, NAN), strict=True)
    into = tuple(torch.full(x.shape, content, dtype=lse.dtype) for x, content in contents)
    how = {"implementation": implementation, "begins": (False, True)}
    attend_backward(rows, k, v, block, into=into, **how)
    torch.testing.assert_close(into[0], found[0][0] + 1, equal_nan=True)
    assert torch.equal(into[1].nan_to_num(), found[0][1].nan_to_num())
