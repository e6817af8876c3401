"""Which heads are together and where a sequence is cut changes no bit: `torch.equal`, not close.

A failure in the heads alone says that a product or a sum sees how many heads there are; one in the cuts
alone, that a tile at the end of a block is not treated as a whole one, or that the order changed.
"""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from seqpar_kernels import (
    Band,
    Block,
    Dropout,
    Partial,
    Ranges,
    Rows,
    Score,
    aten,
    attend,
    attend_backward,
    finish,
    finished_gradients,
    sum_rows,
    tile_border,
)
from seqpar_kernels.tuning import KERNELS, tiles_for
from seqpar_kernels.whole import attend_whole

pytestmark = pytest.mark.usefixtures("products_in_order")
PLAIN = Block(Band(None, 0), Score(0.4))
DTYPES = {
    "reference": (torch.float32, torch.float64, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16),
    "aten": (torch.float32, torch.float64, torch.bfloat16),
}
BOTH = [(name, dtype) for name in ("reference", "triton") for dtype in DTYPES[name]]
ALL = [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes]


def device_of(implementation):
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def blocks_of(implementation, dtype, heads):
    """What is tested: no term but a causal mask; every term, on a place that is not the first.

    Triton, dear where it is interpreted, has one of them, and below few heads and one batch element.
    """
    if implementation == "aten":
        return [PLAIN]
    device = device_of(implementation)
    dtype = dtype if dtype == torch.float64 else torch.float32
    slopes = torch.linspace(0.3, 0.01, heads, dtype=dtype, device=device)
    everything = Block(
        Band(-90, 0),
        Score(0.4, 5.0, slopes, torch.linspace(-1, 2, heads, dtype=dtype, device=device)),
        row=3, col=3, step=2, head=1, terms=(Ranges.documents((0, 50, 190)), Dropout(0.2, 7)),
    )  # fmt: skip
    return [everything] if implementation == "triton" else [PLAIN, everything]


def problem(implementation, dtype, length, heads, group=1):
    """q, k, v, dout as views of larger tensors, so that no slice of theirs is contiguous."""
    generator = torch.Generator().manual_seed(length)
    batch, kv_heads, views = 1 if implementation == "triton" else 2, heads // group, []
    for h, w in (heads, 24), (kv_heads, 24), (kv_heads, 20), (heads, 20):
        x = torch.randn(batch, length + 5, h + 1, w, generator=generator)
        views.append(x.to(dtype).to(device_of(implementation))[:, 2 : length + 2, :h])
    return tuple(views)


def run(tensors, block, implementation, cuts=()):
    """Results with rows and keys cut at these positions: keys visited downwards, rows upwards."""
    q, k, v, dout = tensors
    parts = [slice(*p) for p in pairwise((0, *cuts, q.shape[1]))]
    running, dtype, kernel = Partial.identity(q, v.shape[-1]), q.dtype, implementation
    wide = running.acc.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    dslopes = None if block.score.alibi_slopes is None else running.m.new_zeros(running.m.shape)
    outs, lses, by_row = [], [], []
    for rows in parts:
        for cols in reversed(parts):
            here = block.at(rows.start, cols.start)
            into = running[rows]
            attend(q[:, rows], k[:, cols], v[:, cols], here, into=into, implementation=kernel)
        out, lse = finish(running[rows], dtype, block.score, implementation=kernel)
        dlse = None if implementation == "aten" else lse.sin()
        of = Rows.of(q[:, rows], out, dout[:, rows], lse, dlse, implementation=kernel)
        for cols in reversed(parts):
            attend_backward(
                of, k[:, cols], v[:, cols], block.at(rows.start, cols.start),
                into=(dq[:, rows], dk[:, cols], dv[:, cols]),
                learned={} if dslopes is None else {"alibi_slopes": dslopes[:, rows]},
                implementation=kernel,
            )  # fmt: skip
        outs.append(out)
        lses.append(lse)
        if block.score.sinks is not None:
            by_row += finished_gradients(block.score, lse, of.delta, {"sinks"}).values()
    results = {"out": torch.cat(outs, 1), "lse": torch.cat(lses, 1), "dq": dq, "dk": dk, "dv": dv}
    if dslopes is not None:
        results |= {"dslopes": sum_rows(dslopes), "dsinks": sum_rows(torch.cat(by_row, 1))}
    return results


def of_heads(tensors, block, start, count, group):
    """The same problem for some query heads and the kv heads that they use."""
    q, k, v, dout = tensors
    kv = slice(start // group, (start + count - 1) // group + 1)
    some = slice(start, start + count)
    block = replace(block, score=block.score.of_heads(start, count), head=block.head + start)
    return (q[:, :, some], k[:, :, kv], v[:, :, kv], dout[:, :, some]), block


def assert_same_heads(tensors, block, implementation, names, subsets, group=1):
    full = run(tensors, block, implementation)
    for start, count in subsets:
        part = run(*of_heads(tensors, block, start, count, group), implementation)
        kv = slice(start // group, (start + count - 1) // group + 1)
        for name in names & part.keys():
            heads = kv if name in ("dk", "dv") else slice(start, start + count)
            whole = full[name]
            want = whole[heads] if whole.ndim == 1 else whole[:, :, heads]
            assert torch.equal(part[name], want), (name, start, count, tensors[0].shape)


QUERY = {"out", "lse", "dq", "dslopes", "dsinks"}
EVERY = QUERY | {"dk", "dv"}


@pytest.mark.parametrize(("implementation", "dtype"), ALL, ids=str)
def test_a_head_alone_has_the_bits_it_has_among_others(implementation, dtype):
    heads, subsets = (2, [(1, 1)]) if implementation == "triton" else (8, [(0, 1), (5, 2), (3, 3)])
    for length in (3, 40) if implementation == "triton" else (1, 3, 65, 130):
        tensors = problem(implementation, dtype, length, heads)
        for block in blocks_of(implementation, dtype, heads):
            assert_same_heads(tensors, block, implementation, EVERY, subsets)


@pytest.mark.parametrize(("implementation", "dtype"), ALL, ids=str)
@pytest.mark.parametrize("widths", [(1, 1), (1, 20), (24, 1)], ids=str)
def test_heads_of_one_element_have_the_bits_they_have_among_others(implementation, dtype, widths):
    """Products with a vector are added in an order that depends on how many heads there are."""
    d, vd = widths
    heads, length = (2, 20) if implementation == "triton" else (4, 40)
    q, k, v, dout = problem(implementation, dtype, length, heads)
    tensors = q[..., :d], k[..., :d], v[..., :vd], dout[..., :vd]
    alone = [x[:1] for x in tensors]  # of one batch element a head is a batch of one
    for these in (tensors, alone):
        assert_same_heads(these, PLAIN, implementation, EVERY, [(0, 1), (heads - 1, 1)])


@pytest.mark.parametrize(("implementation", "dtype"), BOTH, ids=str)
def test_grouped_heads_have_the_bits_they_have_among_other_groups(implementation, dtype):
    """Whole groups in everything; a part of a group in what belongs to the queries."""
    group, lengths = (2, (20,)) if implementation == "triton" else (4, (3, 70))
    for length in lengths:
        tensors = problem(implementation, dtype, length, 2 * group, group)
        for block in blocks_of(implementation, dtype, 2 * group):
            assert_same_heads(tensors, block, implementation, EVERY, [(group, group)], group)
            assert_same_heads(tensors, block, implementation, QUERY, [(1, 1)], group)


@pytest.mark.parametrize(("implementation", "dtype"), BOTH, ids=str)
def test_the_first_rows_have_the_bits_they_have_in_a_longer_sequence(implementation, dtype):
    """What is below the causal diagonal, and how full the last tile is, changes no bit of a row."""
    length, shorter = (40, (3,)) if implementation == "triton" else (130, (1, 3, 65))
    tensors = problem(implementation, dtype, length, 2)
    whole = run(tensors, PLAIN, implementation)
    for n in shorter:
        part = run([x[:, :n] for x in tensors], PLAIN, implementation)
        for name in ("out", "lse", "dq"):
            assert torch.equal(part[name], whole[name][:, :n]), (name, n)


@pytest.mark.parametrize(("implementation", "dtype"), BOTH, ids=str)
def test_keys_add_their_query_tiles_upwards_and_the_heads_of_a_group_inside(implementation, dtype):
    """So whoever has the gradient so far and one query head of a tile can go on with it."""
    q, _, v, _ = problem(implementation, dtype, 1, 3, 3)
    border = tile_border(implementation, q, v)
    q, k, v, dout = tensors = problem(implementation, dtype, border + 6, 3, 3)
    running = Partial.identity(q, v.shape[-1])
    attend(q, k, v, PLAIN, into=running, implementation=implementation)
    out, lse = finish(running, dtype, Score(), implementation=implementation)
    wide = lse.dtype
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    tile = tiles_for("dkdv", q, v).rows if implementation == "triton" else border
    for start in range(0, q.shape[1], tile):
        rows = slice(start, start + tile)
        for head in range(q.shape[2]):
            some = (x[:, rows, head : head + 1] for x in (q, out, dout, lse))
            of = Rows.of(*some, lse[:, rows, head : head + 1].sin(), implementation=implementation)
            attend_backward(
                of, k, v, PLAIN.at(start, 0), into=(None, dk, dv), implementation=implementation
            )
    whole = run(tensors, PLAIN, implementation)
    assert torch.equal(dk, whole["dk"])
    assert torch.equal(dv, whole["dv"])


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("implementation", "dtype"), BOTH, ids=str)
def test_cuts_at_tile_borders_change_no_bit(implementation, dtype, group):
    """Also where the last tile is cut short because the sequence ends there."""
    q, _, v, _ = problem(implementation, dtype, 1, 2, group)
    border = tile_border(implementation, q, v)
    long = [] if implementation == "triton" else [(3 * border, [(2,)])]
    for length, multiples in [(2 * border + 1, [(1, 2)]), *long]:
        tensors = problem(implementation, dtype, length, 2, group)
        for block in blocks_of(implementation, dtype, 2):
            whole = run(tensors, block, implementation)
            for cuts in multiples:
                part = run(tensors, block, implementation, [n * border for n in cuts])
                for name, want in whole.items():
                    assert torch.equal(part[name], want), (name, length, cuts)


def test_tile_borders():
    """Of Triton: what the tiles of its three kernels divide. None where there is no such thing."""
    q, v = torch.zeros(1, 2, 3, 24), torch.zeros(1, 2, 3, 100, dtype=torch.float32)
    assert tile_border("reference", q, v) == 64
    border = tile_border("triton", q, v)
    assert all(
        border % t.rows == border % t.cols == 0 for t in (tiles_for(n, q, v) for n in KERNELS)
    )
    for name in ("aten", "flash_attn", "cudnn"):
        assert tile_border(name, q, v) is None


def test_a_tile_border_of_the_reference_does_not_need_triton():
    code = (
        "import sys, torch; from seqpar_kernels import tile_border; x = torch.zeros(1, 2, 3, 4);"
        "tile_border('reference', x, x); tile_border('triton', x, x); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_rows_are_summed_alike_whatever_heads_are_with_them():
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, 333, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        whole = sum_rows(x)
        torch.testing.assert_close(whole, x.sum((0, 1)))
        for start, stop in ((0, 1), (3, 5), (5, 8), (0, 0)):
            some = slice(start, stop)
            assert torch.equal(sum_rows(x[:, :, some]), whole[some])
            assert torch.equal(sum_rows(x[:, :, some].contiguous()), whole[some])


@pytest.mark.parametrize("dtype", DTYPES["aten"], ids=str)
def test_rows_that_begin_anywhere_in_memory_have_the_bits_of_aligned_ones(dtype):
    """Such as those of a file, or of a tensor that begins one element later."""
    x = torch.randn(3 * 40 * 2 * 8 + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    shifted = x[1:].view(3, 1, 40, 2, 8)
    results = [
        attend_whole(*qkv, PLAIN, implementation="aten") for qkv in (shifted, shifted.clone())
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [1, 5, 6, 8])
@pytest.mark.parametrize("dtype", [*DTYPES["aten"], torch.float16], ids=str)
def test_the_op_is_given_rows_that_begin_at_multiples_of_16_bytes(dtype, width):
    """Whatever the machine adds in another order elsewhere."""
    memory = torch.zeros(2 * 7 * 3 * width + 1, dtype=dtype)
    for x in (memory[1:], memory[:-1]):
        whole = x.view(2, 7, 3, width)
        for y in aten._as_the_op_wants(whole, whole[:, :, :2]):
            starts = (y.data_ptr(), *(y.element_size() * s for s in y.stride()[:-1]))
            assert all(start % 16 == 0 for start in starts)
            assert y.stride(-1) == 1
