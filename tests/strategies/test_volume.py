"""What ranks send: counted, by a dry run, and by closed forms written out here.

A dry run knows which pieces go where; the closed forms know only N, P, heads and the shape of the mask,
and judge the counters without it. Worlds are in-process, and blocks are sent but not computed: what is
sent depends on neither. `test_equivalence.py` counts real steps, over processes too.
"""

from fractions import Fraction
from functools import cache

import pytest
import torch

from seqpar import simulate
from seqpar.layout import meets
from seqpar.strategies import STRATEGIES, Plan, allgather, mesh, ring
from seqpar.testing import Case, run_step
from seqpar_kernels import tile_border

HEADS = {
    "MHA": (1, 1),
    "grouped": (4, 1),
    "MQA": (1, 0),
}  # (query, kv) heads of a rank; 0: one in all
SIZES = (1, 2, 3, 5, 8)
UNEVEN = [  # heads that so many ranks cannot share evenly; one rank can, and has one case
    (1, (5, 1)),
    *((n, heads) for n in SIZES for heads in ((6, 6), (8, 2), (5, 1)) if heads[0] % n),
]
GRIDS = [  # the others are in the test of all strategies
    *(("mesh", *grid) for grid in ((4, 1), (4, 2), (4, 4), (6, 2), (6, 3), (6, 6), (8, 2), (8, 8))),
    ("hybrid", 4, 2),
    ("hybrid", 6, 3),
]


@pytest.fixture(autouse=True)
def _compute_nothing(monkeypatch):
    """And what is seen but once, not on every rank: or that would be most of the time."""
    monkeypatch.setattr(Plan, "blocks", lambda *_: iter(()))
    for module in (allgather, mesh, ring):
        monkeypatch.setattr(module, "meets", lambda *spans: met(*map(tuple, spans[:2]), spans[2]))


met = cache(meets)


@cache
def steps(strategy, size, case, implementation="reference"):
    """One step on every rank of a world."""

    def fn(group):
        plan = case.plan(group, strategy, implementation)
        rows = plan.layout.positions(group.rank)
        q, k, v, dout = (x[:, rows] for x in case.tensors())
        return run_step(q, k, v, dout, plan)

    return simulate(size, fn)


def elements(strategy, size, case, implementation="reference"):
    """What each rank sent forward, and backward."""
    sent = [s.sent for s in steps(strategy, size, case, implementation)]
    return [x.forward.elements for x in sent], [x.backward.elements for x in sent]


def even(size, heads, **options):
    """A full mask over shards, heads and widths that can be dealt evenly to so many ranks."""
    query, kv = HEADS[heads]
    widths = {"d": 2 * size, "vd": 2 * size}
    options = widths | {"causal": False, "invariant": False} | options
    return Case(2 * size, size * query, size * kv or 1, **options)


def degree(size, columns):
    """The `Case.degree` of the grid with so many columns."""
    return [n for n in range(1, size + 1) if size % n == 0].index(columns)


def narrow_and_wide(strategy, size, case, columns=1):
    """Elements that every rank sends: ((forward, backward) as the tensors are, the same as sums are).

    The table of the design with what travels in which type, for full masks and even shards.
    """
    P, N, n_q, n_k, d = size, case.length, case.hq, case.hkv, case.d
    hq, hk, f = n_q * d, n_k * d, Fraction(P - 1, P)
    if strategy == "ulysses":
        exchanged = f / P * N * (2 * hq + 2 * max(n_k, P) * d)
        return (exchanged, exchanged), (0, 0)
    if strategy == "ring" and n_q == n_k:  # queries travel backward
        return (2 * f * N * hk, 2 * f * N * hq), (0, f * N * (hq + 2 * n_q))
    if strategy in ("ring", "allgather"):
        return (2 * f * N * hk, 2 * f * N * hk), (0, 2 * f * N * hk)
    if strategy == "mesh":
        R, C, n = P // columns, columns, Fraction(N, P)
        narrow = n * ((C - 1) * hq + (R - 1) * 2 * hk), n * ((C - 1) * 2 * hq + (R - 1) * 2 * hk)
        wide = n * (C - 1) * (hq + 2 * n_q), n * ((C - 1) * (hq + 2 * n_q) + (R - 1) * 2 * hk)
        return narrow, wide
    if strategy == "hybrid":
        U, R = columns, P // columns
        hk = max(n_k, U) * d
        exchange = Fraction(U - 1, U) * N / P * (2 * hq + 2 * hk)
        turns, n = R - 1, Fraction(N, R)
        if 3 * hq + 2 * n_q < 4 * hk:
            sums = turns * n * (hq + 2 * n_q) / U
            return (exchange + turns * n * 2 * hk / U, exchange + turns * n * 2 * hq / U), (0, sums)
        return (exchange + turns * n * 2 * hk / U,) * 2, (0, turns * n * 2 * hk / U)
    if strategy == "materialised_rows":
        return (2 * f * N * hk, f * N * hk), (0, 2 * f * N * hk)
    if strategy == "materialised_columns":
        return (f * N * hq, f * N * hq), (f * N * (hq + 4 * n_q), f * N * (hq + n_q))
    assert strategy == "materialised_depth", f"write the closed form of {strategy} here"
    exchanged, scores = f / P * N * (2 * hq + 2 * hk), 2 * f * n_q * N**2
    return (exchanged, exchanged), (scores, scores + f * N * n_q)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_even_shards_send_what_the_table_says(size, heads, strategy):
    """A failure of the first line alone: the dry run; of the others: routes or counters.

    In bfloat16, where bytes tell what travels as it is from sums and statistics, which are float32.
    """
    columns = 4 if size == 8 else 1
    case = even(size, heads, degree=degree(size, columns), dtype=torch.bfloat16)
    assert all(s.sent == s.derived for s in steps(strategy, size, case))
    narrow, wide = narrow_and_wide(strategy, size, case, columns)
    for step in steps(strategy, size, case):
        for direction, count in enumerate((step.sent.forward, step.sent.backward)):
            assert count.elements == narrow[direction] + wide[direction]
            assert count.bytes == 2 * narrow[direction] + 4 * wide[direction]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("size", "heads"), UNEVEN)
def test_uneven_shards_send_what_the_dry_run_says(size, heads, strategy):
    """Odd numbers of everything, a causal zigzag, values narrower than keys, sums twice as wide."""
    case = Case(29, *heads, d=5, vd=3, kind="zigzag", degree=1, dtype=torch.bfloat16)
    for step in steps(strategy, size, case):
        assert step.sent == step.derived


@pytest.mark.parametrize("strategy", ["ring", "mesh"])
@pytest.mark.parametrize(("length", "heads"), [(32, (4, 1)), (37, (2, 2))])
def test_sixteen_ranks_send_what_the_dry_run_says(length, heads, strategy):
    case = Case(length, *heads, d=4, vd=4, degree=2, causal=length == 37)
    for step in steps(strategy, 16, case):
        assert step.sent == step.derived


@pytest.mark.parametrize(("strategy", "size", "columns"), GRIDS)
def test_any_grid_sends_what_the_table_says(strategy, size, columns):
    case = even(size, "grouped", degree=degree(size, columns))
    assert all(s.sent == s.derived for s in steps(strategy, size, case))
    narrow, wide = narrow_and_wide(strategy, size, case, columns)
    for direction, counted in enumerate(elements(strategy, size, case)):
        assert counted == [narrow[direction] + wide[direction]] * size


def test_implementations_that_need_out_send_it_too():
    """Torch's own op wants `out` beside dout: (P-1)/P N hq more where queries travel, if they still do."""
    d, hq = 8, 4 * 8
    case = even(4, "MHA", dtype=torch.bfloat16)
    assert case.d == d
    _, backward = elements("ring", 4, case, "aten")
    assert backward == [Fraction(3, 4) * 8 * (4 * hq + 2 * 4)] * 4
    case = even(4, "MHA", dtype=torch.float64)  # 4 hq + 2 nq is more than 4 hk
    _, backward = elements("ring", 4, case, "aten")
    assert backward == [Fraction(3, 4) * 8 * 4 * hq] * 4


def test_a_square_mesh_sends_less_than_half_of_a_ring():
    """4 x 4: (3 (2 hq + 2 nq) + 3 * 2 hq) / 16 against 15 / 16 * 2 hq, so 0.4 + 0.2 / d."""
    case = Case(32, 2, 2, 16, 16, causal=False, degree=2)
    (mesh, _), (ring, _) = (elements(name, 16, case) for name in ("mesh", "ring"))
    assert ring == [2 * 15 * 2 * 2 * 16] * 16
    assert [Fraction(m, r) for m, r in zip(mesh, ring, strict=True)] == [Fraction(33, 80)] * 16
    assert max(mesh) <= 0.42 * min(ring)


@pytest.mark.parametrize("size", SIZES)
def test_a_causal_contiguous_ring_makes_the_hops_that_are_needed(size):
    """Block r is wanted by the P - 1 - r ranks after it, and each neighbour passes it on."""
    case = even(size, "grouped", causal=True)
    block = case.length // size * 2 * case.hkv * case.d
    forward, backward = elements("ring", size, case)
    assert sum(forward) == block * sum(size - 1 - r for r in range(size))
    assert forward == [block * (r + 1) for r in range(size - 1)] + [0]
    sums = [block * r for r in range(size)]  # of every block that rank r sees, its own apart
    assert [b - f for f, b in zip(forward, backward, strict=True)] == sums


@pytest.mark.parametrize("size", SIZES)
def test_queries_that_travel_skip_the_same_hops(size):
    """Rows r are wanted by the keys of the r ranks before; the other way round, block for block."""
    case = even(size, "MHA", causal=True, d=8, vd=8)
    rows = case.length // size
    _, backward = elements("ring", size, case)
    passed = [0] + [size - r for r in range(1, size)]
    home = [size - 1 - r for r in range(size)]
    travelling, sums = rows * case.hq * (2 * 8 + 2), rows * case.hq * 8
    assert backward == [travelling * p + sums * h for p, h in zip(passed, home, strict=True)]


@pytest.mark.parametrize(("window", "blocks"), [(1, 0), (2, 1), (8, 1), (9, 1), (10, 2)])
@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_windowed_ring_sends_one_block_however_many_ranks(size, window, blocks):
    """Of 8 rows each; a window of up to N / P + 1 ends with the rank before."""
    case = Case(8 * size, 4, 1, 4, 4, window=window)
    block = 8 * 2 * 4
    forward, backward = elements("ring", size, case)
    wanted = [min(blocks, size - 1 - r) for r in range(size)]
    assert sum(forward) == block * sum(wanted)
    if blocks <= 1:
        assert forward == [block * w for w in wanted]
        sums = [block * bool(r) * blocks for r in range(size)]
        assert [b - f for f, b in zip(forward, backward, strict=True)] == sums


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_a_window_to_both_sides_sends_two_blocks(size):
    """But at the ends. Of three ranks the last passes the middle block on, so only the total is as told."""
    case = Case(8 * size, 4, 1, 4, 4, causal=False, window=8)
    block = 8 * 2 * 4
    forward, _ = elements("ring", size, case)
    assert sum(forward) == block * 2 * (size - 1)
    if size != 3:
        assert forward == [block] + [2 * block] * (size - 2) + [block]


@pytest.mark.parametrize("strategy", ["ring", "allgather", "mesh"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [2, 5, 8])
def test_a_document_per_rank_sends_nothing(size, causal, strategy):
    documents = tuple(range(0, 4 * size + 1, 4))
    case = Case(4 * size, 2, 1, 4, 4, causal=causal, documents=documents)  # degree 0: R = P, C = 1
    assert elements(strategy, size, case) == ([0] * size, [0] * size)


def test_what_the_same_bits_for_any_size_cost():
    """In order a ring's sums begin with the owner, an all-gather gathers queries for dk and dv."""
    size, d = 3, 4
    rows = tile_border("reference", torch.empty(1, 1, 2, d), torch.empty(1, 1, 1, d))
    case = Case(size * rows, 2, 1, d, d, multiple_of=rows, causal=True)
    in_order = Case(size * rows, 2, 1, d, d, multiple_of=rows, causal=True, invariant=True)
    hq, hk = 2 * d, d
    for strategy in ("ring", "allgather"):
        assert all(s.sent == s.derived for s in steps(strategy, size, in_order))
        assert elements(strategy, size, in_order)[0] == elements(strategy, size, case)[0]
    (_, free), (_, bound) = elements("ring", size, case), elements("ring", size, in_order)
    assert [b - f for f, b in zip(free, bound, strict=True)] == [rows * 2 * hk] * (size - 1) + [0]
    keys, backward = elements("allgather", size, in_order)
    queries = [r * rows * (2 * hq + 2 * 2) for r in range(size)]  # rank r's, to the ranks before
    assert [b - f for f, b in zip(keys, backward, strict=True)] == queries


def test_replicated_heads_in_order_come_back_once_for_every_query_head():
    P, n_q, n_k, d, N = 4, 8, 2, 4, 16
    case = Case(N, n_q, n_k, d, d, causal=False, invariant=True)
    forward, backward = elements("ulysses", P, case)
    part = Fraction(P - 1, P * P) * N
    assert forward == [part * (2 * n_q * d + 2 * P * d)] * P
    assert backward == [part * (2 * n_q * d + 2 * n_q * d)] * P
