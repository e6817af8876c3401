"""A block that is all there is gives the bits that it gives when sums are begun, continued and finished."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from seqpar_kernels import (
    Band,
    Block,
    Partial,
    Ranges,
    Rows,
    Score,
    aten,
    attend,
    attend_backward,
    attention,
    begin,
    finish,
)
from seqpar_kernels.whole import attend_whole, attend_whole_backward

BANDS = st.builds(Band, st.none() | st.integers(-90, 20), st.none() | st.integers(-20, 90))
SIZES = st.integers(0, 90)
CAUSAL = Band(None, 0)


def problem(i, j, heads, widths, dtype, batch=1):
    generator = torch.Generator().manual_seed(1)
    (hq, hkv), (d, vd) = heads, widths
    shapes = (i, hq, d), (j, hkv, d), (j, hkv, vd), (i, hq, vd)
    return [torch.randn(batch, *s, generator=generator).to(dtype) for s in shapes]


def in_sums(q, k, v, dout, block):
    """(out, lse, dq, dk, dv) by sums."""
    running = Partial.identity(q, v.shape[-1])
    attend(q, k, v, block, into=running)
    out, lse = finish(running, q.dtype, block.score)
    into = tuple(torch.zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    attend_backward(Rows.of(q, out, dout, lse), k, v, block, into=into)
    return out, lse, *(x.to(q.dtype) for x in into)


@given(
    band=BANDS,
    sizes=st.tuples(SIZES, SIZES),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2)]),
    widths=st.sampled_from([(8, 8), (5, 16), (16, 3), (1, 1)]),
    batch=st.sampled_from([1, 2]),
    scale=st.sampled_from([0.4, -0.3, 0.0]),
    bounds=st.none() | st.lists(st.integers(0, 90), max_size=3),
    at=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    sinks=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
@example(CAUSAL, (64, 64), (4, 4), (16, 3), 2, 0.4, None, (0, 0), False, torch.float16)
@example(Band(None, -5), (64, 64), (4, 4), (8, 8), 1, 0.4, None, (0, 0), False, torch.float32)
@example(Band(None, 5), (70, 60), (4, 4), (8, 8), 1, 0.4, None, (0, 0), False, torch.float32)
@example(Band(), (33, 70), (4, 4), (5, 16), 1, -0.3, None, (0, 0), True, torch.bfloat16)
@example(Band(), (9, 40), (4, 4), (8, 8), 1, 0.4, [20], (20, 0), False, torch.float32)
def test_bits_are_those_of_sums(band, sizes, heads, widths, batch, scale, bounds, at, sinks, dtype):
    q, k, v, dout = problem(*sizes, heads, widths, dtype, batch)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.linspace(-1, 1, heads[0], dtype=wide) if sinks else None
    documents = () if bounds is None else (Ranges.documents((0, *sorted(bounds))),)
    block = Block(band, Score(scale, sinks=logits), *at, terms=documents)
    want = in_sums(q, k, v, dout, block)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, block)
    got = out, lse, *torch.autograd.grad(out, leaves, dout)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert x.dtype == y.dtype
        assert x.is_contiguous()
        assert torch.equal(x, y), name


@given(
    band=BANDS,
    sizes=st.tuples(SIZES, SIZES),
    heads=st.sampled_from([(4, 4), (4, 2)]),
    widths=st.sampled_from([(8, 8), (16, 3)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    poisoned=st.booleans(),
)
@example(CAUSAL, (64, 64), (4, 4), (16, 3), torch.float16, False)
@example(Band(), (33, 70), (4, 4), (8, 8), torch.bfloat16, False)
@example(Band(None, 5), (64, 64), (4, 4), (8, 8), torch.float32, True)
def test_sums_begin_with_the_bits_of_a_first_block(band, sizes, heads, widths, dtype, poisoned):
    q, k, v, _ = problem(*sizes, heads, widths, dtype)
    if poisoned and k.shape[1]:
        k[0, -1] = torch.inf
    block, running = Block(band, Score(0.4)), Partial.identity(q, v.shape[-1])
    attend(q, k, v, block, into=running)
    begun = begin(q, k, v, block)
    for name in ("acc", "m", "l"):
        x, y = getattr(begun, name), getattr(running, name)
        assert x.dtype == y.dtype
        assert x.is_contiguous()
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("band", [CAUSAL, Band()])
def test_one_call_does_it_where_it_can(band, monkeypatch):
    q, k, v, dout = problem(40, 40, (4, 4), (16, 16), torch.float32)
    block = Block(band, Score(0.4))
    monkeypatch.setattr(aten, "forward", None)  # the way of sums
    monkeypatch.setattr(aten, "backward", None)
    out, lse = attend_whole(q, k, v, block)
    assert attend_whole_backward(dout, q, k, v, out, lse, block) is not None


@pytest.mark.parametrize(
    "block",
    [
        Block(Band(-5, 0), Score(0.4)),  # a window is several rectangles
        Block(Band(None, -1), Score(0.4)),  # row 0 sees nothing
        Block(CAUSAL, Score(-0.4)),  # the sign goes to dq
        Block(CAUSAL, Score(0.4), terms=(Ranges.documents((0, 9)),)),
        Block(CAUSAL, Score(0.4, softcap=2.0)),
    ],
    ids=["window", "hidden row", "negative", "documents", "softcap"],
)
def test_what_one_call_does_not_do_is_left_to_sums(block):
    q, k, v, dout = problem(40, 40, (4, 4), (16, 16), torch.float32)
    out, lse = attend_whole(q, k, v, block)
    assert attend_whole_backward(dout, q, k, v, out, lse, block) is None
    assert torch.equal(out, in_sums(q, k, v, dout, block)[0])


def test_poison_stays_where_it_is_seen():
    q, k, v, dout = problem(40, 40, (4, 4), (16, 16), torch.float32)
    v[0, 30, 1, 3] = torch.nan
    block = Block(CAUSAL, Score(0.4))
    out, lse = attend_whole(q, k, v, block)
    assert torch.equal(out.isnan().nonzero()[:, 1].unique(), torch.arange(30, 40))
    assert attend_whole_backward(dout, q, k, v, out, lse, block) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_kernels_round_gradients_of_a_whole_block_as_sums_of_float32_are_rounded(dtype, heads):
    generator = torch.Generator().manual_seed(0)
    shapes = (40, heads[0], 8), (40, heads[1], 8), (40, heads[1], 6), (40, heads[0], 6)
    q, k, v, dout = (torch.randn(1, *s, generator=generator).to(dtype) for s in shapes)
    block = Block(Band(None, 0), Score(0.4, softcap=5.0))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, block, implementation="triton")[0]
    found = torch.autograd.grad(out, leaves, dout)
    with torch.no_grad():
        same, lse = attend_whole(q, k, v, block, implementation="triton")
        assert torch.equal(out, same)
        into = tuple(torch.zeros(x.shape) for x in (q, k, v))
        rows = Rows.of(q, out, dout, lse, implementation="triton")
        attend_backward(rows, k, v, block, into=into, implementation="triton")
    for x, y in zip(found, into, strict=True):
        assert torch.equal(x, y.to(dtype))
