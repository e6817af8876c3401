"""Every implementation of a block against the float64 oracle: all score terms, bands, places, carries.

The Triton kernels run compiled where there is a GPU, else interpreted. A lower precision may have twice
the error of dense attention in that precision, see `seqpar.testing.budget`.
"""

import time
from threading import Thread

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seqpar import simulate
from seqpar.strategies import STRATEGIES
from seqpar.testing import Budget, Case, errors_on_rank
from seqpar.testing.budget import max_error
from seqpar.testing.drawn import examples
from seqpar.testing.oracle import Terms
from seqpar_kernels import (
    BY_BLOCKS,
    TENSORS,
    Band,
    Block,
    Dropout,
    Partial,
    Ranges,
    Rows,
    Score,
    accumulation_dtype,
    attend,
    attend_backward,
    finish,
    finished_gradients,
    sum_rows,
    triton_attention,
)
from seqpar_kernels.tuning import Tiles

pytestmark = pytest.mark.usefixtures("products_in_order")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 2**40 + 5
BANDS = st.builds(Band, st.none() | st.integers(-60, 20), st.none() | st.integers(-20, 60))
SCORES = st.fixed_dictionaries(
    {"scale": st.sampled_from([0.4, 0.4, 0.4, -0.3, 0.0, 1e-50])},
    optional={
        "softcap": st.sampled_from([0.5, 20.0]),
        "slopes": st.just(True),
        "sinks": st.just(True),
        "dropout": st.sampled_from([0.2, 0.7]),
    },
)
PLACES = st.fixed_dictionaries(
    {}, optional={"row": st.integers(0, 99), "col": st.integers(0, 99), "step": st.integers(1, 7)}
)
DTYPES = st.sampled_from([torch.float32] * 3 + [torch.bfloat16, torch.float16])


def problem(num_rows, num_cols, heads, widths, dtype, device=DEVICE, batch=1):
    """q, k, v, dout on the device."""
    generator = torch.Generator().manual_seed(1)
    (hq, hkv), (d, vd) = heads, widths
    shapes = (num_rows, hq, d), (num_cols, hkv, d), (num_cols, hkv, vd), (num_rows, hq, vd)
    tensors = (torch.randn(batch, *s, dtype=torch.float64, generator=generator) for s in shapes)
    return tuple(x.to(dtype).to(device) for x in tensors)


def make_block(band, score, place, bounds, hq, device=DEVICE, wide=torch.float32):
    """The block of a drawn problem; slopes and sinks on the device."""
    slopes = torch.linspace(0.3, 0.01, hq, device=device, dtype=wide) if "slopes" in score else None
    sinks = torch.linspace(-1.0, 2.0, hq, device=device, dtype=wide) if "sinks" in score else None
    documents = [] if bounds is None else [Ranges.documents((0, *sorted(bounds)))]
    dropout = [Dropout(score["dropout"], SEED)] if "dropout" in score else []
    return Block(
        band,
        Score(score["scale"], score.get("softcap"), slopes, sinks),
        **place,
        head=2,
        terms=(*documents, *dropout),
    )


def seen_by_definition(block, num_rows, num_cols):
    """The mask and the positions of rows and columns, straight from the definitions."""
    i, j = torch.arange(num_rows)[:, None], torch.arange(num_cols)[None]
    lower = -(10**9) if block.band.lower is None else block.band.lower
    upper = 10**9 if block.band.upper is None else block.band.upper
    seen = (j >= i + lower) & (j <= i + upper)
    row, col = block.row + block.step * i[:, 0], block.col + block.step * j[0]
    for ranges in (term for term in block.terms if isinstance(term, Ranges)):
        seen &= sum(
            (row[:, None] >= r.top) & (row[:, None] < r.bottom) & (col >= r.left) & (col < r.right)
            & (col - row[:, None] >= r.lower) & (col - row[:, None] <= r.upper)
            for r in ranges.regions
        ) > 0  # fmt: skip
    return seen, row, col


def run(tensors, block, hops, how):
    """Results with the keys in these blocks, and the partial and dq as they were.

    `how` is the name of an implementation, or the tiles for the Triton kernels.
    """
    q, k, v, dout = tensors
    name = how if isinstance(how, str) else "triton"
    running = Partial.identity(q, v.shape[-1])
    for a, b in reversed(hops):
        part = q, k[:, a:b], v[:, a:b], block.at(0, a)
        if isinstance(how, str):
            attend(*part, into=running, implementation=how)
        else:
            triton_attention.forward(*part, running, how)
    raw = tuple(x.clone() for x in (running.acc, running.m, running.l))
    out, lse = finish(running, q.dtype, block.score, implementation=name)
    rows = Rows.of(q, out, dout, lse, implementation=name)
    dq, dk, dv = (torch.zeros(x.shape, device=x.device, dtype=lse.dtype) for x in (q, k, v))
    learned = {n: torch.zeros_like(lse) for n in BY_BLOCKS if n in block.score.tensors}
    for a, b in reversed(hops):
        part = rows, k[:, a:b], v[:, a:b], block.at(0, a)
        into = dq, dk[:, a:b], dv[:, a:b]
        if isinstance(how, str):
            attend_backward(
                *part,
                into=into,
                learned=learned,
                implementation=how,
            )
        else:
            triton_attention.backward(*part, into, learned, tiles=(how, how))
    results = [out, dq, dk, dv]
    learned |= finished_gradients(block.score, lse, rows.delta, TENSORS)
    results += [sum_rows(x) for x in learned.values()]
    return results, (*raw, dq, dk, dv)


def hops_at(cuts, num_cols):
    ends = [0, *sorted(min(c, num_cols) for c in cuts), num_cols]
    return [(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True) if a < b]


@given(
    band=BANDS,
    score=SCORES,
    place=PLACES,
    bounds=st.none() | st.none() | st.lists(st.integers(0, 200), max_size=6),
    sizes=st.tuples(
        st.integers(1, 40), st.integers(1, 40)
    ),  # up to three tiles: a first, a whole, a last
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    widths=st.sampled_from([(16, 16), (24, 5), (3, 40), (80, 96)]),
    dtype=DTYPES,
    cuts=st.lists(st.integers(0, 40), max_size=2),
    tiles=st.sampled_from([Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1)]),
)
@settings(max_examples=examples(1))
@example(Band(None, 0), {"scale": 0.4, "slopes": True, "sinks": True, "dropout": 0.2, "softcap": 20.0},
         {"row": 7, "col": 3, "step": 5}, [4, 4, 40, 150], (40, 40), (4, 2), (24, 5), torch.float32,
         [20], Tiles(16, 16, 4, 1))  # fmt: skip
@example(Band(-3, -1), {"scale": 0.4}, {}, None, (3, 40), (3, 1), (16, 16), torch.float32, [],
         Tiles(16, 16, 4, 1))  # fmt: skip
@example(Band(-9, 9), {"scale": 0.4, "softcap": 0.5, "dropout": 0.7}, {}, None, (40, 40), (1, 1), (16, 16),
         torch.bfloat16, [17, 33], Tiles(32, 16, 4, 1))  # fmt: skip
# Sizes that tiles divide, so that a block has no upper edge, no lower edge, or neither.
@example(Band(), {"scale": 0.4}, {}, None, (32, 48), (2, 2), (16, 16), torch.float32, [],
         Tiles(16, 16, 4, 1))  # fmt: skip
@example(Band(-5, None), {"scale": 0.4}, {}, None, (48, 32), (4, 2), (16, 16), torch.float32, [16],
         Tiles(16, 16, 4, 1))  # fmt: skip
@example(Band(None, 3), {"scale": 0.4}, {}, None, (48, 32), (4, 2), (16, 16), torch.float32, [],
         Tiles(16, 16, 4, 1))  # fmt: skip
@example(Band(20, None), {"scale": 1e-50}, {}, None, (32, 32), (1, 1), (16, 16), torch.float32, [],
         Tiles(16, 16, 4, 1))  # fmt: skip
def test_equals_the_oracle(band, score, place, bounds, sizes, heads, widths, dtype, cuts, tiles):
    check(tiles, band, score, place, bounds, sizes, heads, widths, dtype, cuts)


@pytest.mark.parametrize("implementation", ["reference", "aten"])
@given(
    band=BANDS,
    score=SCORES,
    place=PLACES,
    bounds=st.none() | st.lists(st.integers(0, 300), max_size=6),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    widths=st.sampled_from([(16, 16), (24, 5), (3, 40)]),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.bfloat16]),
    cuts=st.lists(st.integers(0, 150), max_size=2),
)
@example(Band(), {"scale": 0.4, "sinks": True}, {"step": 3}, [70, 70, 80], (70, 80), (4, 2), (16, 16),
         torch.float64, [])  # fmt: skip
def test_torch_equals_the_oracle(
    implementation, band, score, place, bounds, sizes, heads, widths, dtype, cuts
):
    if implementation == "aten":
        score = {name: x for name, x in score.items() if name in ("scale", "sinks")}
    check(implementation, band, score, place, bounds, sizes, heads, widths, dtype, cuts)


def check(how, band, score, place, bounds, sizes, heads, widths, dtype, cuts):
    device = "cpu" if isinstance(how, str) else DEVICE
    tensors = problem(*sizes, heads, widths, dtype, device)
    block = make_block(band, score, place, bounds, heads[0], device, accumulation_dtype(dtype))
    seen, row, col = seen_by_definition(block, *sizes)
    cpu = [None if x is None else x.cpu() for x in (block.score.alibi_slopes, block.score.sinks)]
    dropout = (score["dropout"], SEED) if "dropout" in score else None
    terms = Terms(score["scale"], score.get("softcap"), *cpu, dropout, row, col, head=2)
    budget = Budget.of(*(x.cpu() for x in tensors), seen, terms)

    results, _ = run(tensors, block, hops_at(cuts, sizes[1]), how)
    names = ["out", "dq", "dk", "dv"]
    names += ["dslopes"] * (cpu[0] is not None) + ["dsinks"] * (cpu[1] is not None)
    for name, got, want, allowed in zip(
        names, results, budget.expected, budget.allowed, strict=True
    ):
        assert max_error(got.cpu(), want) <= allowed, name


@given(
    band=BANDS,
    score=SCORES,
    bounds=st.none() | st.lists(st.integers(0, 99), max_size=4),
    num_rows=st.integers(1, 40),
    num_cols=st.integers(17, 55),  # two to four tiles
    heads=st.sampled_from([(1, 1), (2, 1)]),
    dtype=DTYPES,
    tiles=st.sampled_from([Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1)]),
    data=st.data(),
)
@settings(max_examples=examples(0.5))
def test_cutting_keys_at_tile_borders_changes_no_bit(
    band, score, bounds, num_rows, num_cols, heads, dtype, tiles, data
):
    tensors = problem(num_rows, num_cols, heads, (16, 24), dtype)
    block = make_block(band, score, {"row": 3, "step": 2}, bounds, heads[0])
    borders = st.integers(1, num_cols // tiles.cols).map(lambda t: t * tiles.cols)
    hops = hops_at(data.draw(st.lists(borders, min_size=1, max_size=3)), num_cols)
    _, whole = run(tensors, block, [(0, num_cols)], tiles)
    _, cut = run(tensors, block, hops, tiles)
    for name, a, b in zip(("acc", "m", "l", "dq", "dk", "dv"), cut, whole, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutting_queries_at_tile_borders_changes_no_bit(dtype):
    """Dk and dv of a group of heads add their query tiles upwards, whoever computed them."""
    q, k, v, dout = problem(64, 40, (4, 2), (16, 16), dtype)
    block, tiles = make_block(Band(None, 3), {"scale": 0.4}, {}, None, 4), Tiles(16, 16, 4, 1)
    _, whole = run((q, k, v, dout), block, [(0, 40)], tiles)
    running = Partial.identity(q, 16)
    triton_attention.forward(q, k, v, block, running, tiles)
    out, lse = finish(running, q.dtype, Score(), implementation="triton")
    rows = Rows.of(q, out, dout, lse, implementation="triton")
    dq, dk, dv = (torch.zeros(x.shape, device=DEVICE) for x in (q, k, v))
    for a, b in ((0, 16), (16, 48), (48, 64)):
        into = dq[:, a:b], dk, dv
        triton_attention.backward(rows[a:b], k, v, block.at(a, 0), into, {}, tiles=(tiles, tiles))
    for a, b in zip((dq, dk, dv), whole[3:], strict=True):
        assert torch.equal(a, b)


def test_rows_that_see_nothing_are_left_alone():
    q, k, v, _ = problem(40, 40, (2, 2), (16, 16), torch.float32)
    running = Partial.identity(q, 16)
    running.acc.fill_(3.0), running.m.fill_(1.0), running.l.fill_(2.0)
    block = make_block(Band(None, -30), {"scale": 0.4}, {}, None, 2)
    attend(q, k, v, block, into=running, implementation="triton")
    assert (running.acc[:, :30] == 3).all()
    assert (running.m[:, :30] == 1).all()
    assert (running.l[:, :30] == 2).all()
    assert running.acc.isfinite().all()


def strided(shape, strides, dtype, far):
    """A view over so much address space that 32-bit offsets overflow; only what is used is touched."""
    x = torch.empty(far, dtype=dtype, device=DEVICE).as_strided(shape, strides)
    return x.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype))


@pytest.mark.parametrize(
    ("what", "strides"),
    [
        ("batch", (2**30 + 64, 48, 16, 1)),
        ("heads", (4096, 48, 2**30 + 64, 1)),
        ("rows", (16, 2**27, 64, 1)),
    ],
)
def test_offsets_beyond_32_bits(what, strides):
    """A tensor of more than 2**31 elements: each stride fits 32 bits, its offsets in turn do not."""
    shape = (3, 20, 3, 16)
    far = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    assert far > 2**31, what
    big = strided(shape, strides, torch.float16, far)
    small = big.contiguous()
    block = make_block(Band(None, 0), {"scale": 0.4}, {}, None, 3)
    results = []
    for x, dout in ((small, small), (big, small), (small, big)):
        running = Partial.identity(x, 16)
        attend(x, x, x, block, into=running, implementation="triton")
        out, lse = finish(running, torch.float32, Score(), implementation="triton")
        rows = Rows.of(x, out, dout, lse, implementation="triton")
        into = tuple(torch.zeros(shape, device=DEVICE) for _ in range(3))
        attend_backward(rows, x, x, block, into=into, implementation="triton")
        results.append((out, lse, *into))
    for far in results[1:]:
        for a, b in zip(far, results[0], strict=True):
            assert torch.equal(a, b)


SHARDED = [
    Case(25, 4, 2, dtype=torch.float32, kind="zigzag", alibi=True, dropout=0.3),
    Case(33, 2, 1, dtype=torch.float32, kind="striped", window=7, sinks=True, softcap=2.0),
    Case(3, 2, 1, 24, 40, 2, dtype=torch.float16, sinks=True, alibi=True),
]
ALONE = Case(34, 2, 1, dtype=torch.bfloat16)  # more than one tile of the table
WORLDS = [
    *((case, 3, strategy) for case in SHARDED for strategy in STRATEGIES),
    *(
        (ALONE, 1, strategy) for strategy in ("ring", "materialised_rows")
    ),  # or all would do the same
]


@pytest.mark.parametrize(("case", "size", "strategy"), WORLDS, ids=str)
def test_ranks_in_threads_equal_one_device(case, size, strategy):
    """One world for each case: worlds of any size are drawn in `test_equivalence`."""
    results = simulate(size, errors_on_rank, case, strategy, "triton", case.budget(), DEVICE)
    for rank, errors in enumerate(results):
        assert not errors.failures, f"rank {rank}: {errors.failures}"


def test_one_launch_at_a_time():
    """Triton gives a thread a kernel that another is still loading: ranks that are threads launch in turn."""
    inside, most = [], []

    class Kernel:
        def __getitem__(self, grid):
            return self

        def __call__(self):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    x = torch.zeros(1, device=DEVICE)
    threads = [Thread(target=triton_attention.launch, args=(Kernel(), 1, x)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8
