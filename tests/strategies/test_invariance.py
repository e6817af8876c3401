"""The same bits for any number of ranks: out, all gradients, with every score term and dropout.

A failure means that somewhere the order of additions follows from how the work was split. Nothing here is
a tolerance: `torch.equal`. Gradients of slopes and sinks are the sum of the ranks' shares.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import seqpar
from seqpar import Mask, Plan, contiguous, simulate, zigzag
from seqpar.calls import resolve
from seqpar.testing import Case, run_step
from seqpar.testing.drawn import SCORE_TERMS, cases, examples

SIZES = (2, 3, 4, 5, 7, 8)
TERMS = {"softcap": 5.0, "alibi": True, "sinks": True, "dropout": 0.3}
BORDER = {"reference": 64, "triton": 32}
PLAIN = Case(0, 4, 2, d=8, vd=5, invariant=True)


def on_each_rank(group, case, strategy, implementation):
    rows, cols = (x.positions(group.rank) for x in (case.layout(group.size), case.keys(group.size)))
    held = rows, cols, cols, rows
    local = (x[:, at] for x, at in zip(case.tensors(), held, strict=True))
    return run_step(*local, case.plan(group, strategy, implementation)).results


def whole(results, case, size):
    """The results of all ranks as those of one device."""
    rows, cols = (
        torch.cat([x.positions(rank) for rank in range(size)])
        for x in (case.layout(size), case.keys(size))
    )
    joined = []
    for name, *shares in zip(case.names, *results, strict=True):
        if name in ("out", "dq", "dk", "dv"):
            x = torch.cat(shares, 1)
            joined.append(x.index_select(1, torch.argsort(cols if name in ("dk", "dv") else rows)))
        else:
            joined.append(sum(shares))
    return joined


def check(run, case, strategy, implementation, sizes=SIZES):
    one = whole(run(1, on_each_rank, case, strategy, implementation), case, 1)
    for size in sizes:
        many = whole(run(size, on_each_rank, case, strategy, implementation), case, size)
        for name, x, y in zip(case.names, one, many, strict=True):
            assert torch.equal(x, y), f"{name} differs with {size} ranks: {(x - y).abs().max()}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def sizes_for(dtype, sizes=SIZES):
    """Two sizes in bfloat16, whose sums are the float32 ones, and whose rounding hides most differences."""
    return sizes if dtype == torch.float32 else (5, 8)


@DTYPES
@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_ulysses_in_any_layout(kind, implementation, dtype):
    """Grouped heads that ranks share, too: 6 query heads on 2 kv heads are split by 4, 5, 7 and 8."""
    case = replace(PLAIN, length=100, hq=6, kind=kind, dtype=dtype, batch=2)
    if implementation:
        case = replace(case, **TERMS)
    check(simulate, case, "ulysses", implementation, sizes_for(dtype))


@given(
    case=cases(terms=SCORE_TERMS, lengths=st.integers(0, 100)),
    size=st.integers(2, 5),
    implementation=st.sampled_from([None, "reference"]),
)
@settings(max_examples=examples(0.5))
@example(Case(5, 3, 1, d=1, vd=16, kind="zigzag", dtype=torch.float32), 2, "reference")
@example(Case(40, 4, 4, d=3, vd=1, causal=False, dtype=torch.float32), 4, "reference")
@example(Case(40, 2, 2, d=1, vd=1, dtype=torch.float64), 2, None)
@example(Case(4, 2, 1, d=1, vd=5, causal=False, dtype=torch.float64), 2, None)
@example(Case(16, 4, 2, d=13, vd=13, kind="striped", dtype=torch.float32), 3, None)
@example(Case(70, 4, 2, d=8, vd=8, kind="unsorted", dtype=torch.float32), 3, None)
@example(Case(70, 4, 2, kind="stepped", alibi=True, sinks=True, dtype=torch.float32), 3, None)
def test_ulysses_of_any_widths_heads_and_layout(case, size, implementation):
    check(simulate, replace(case, invariant=True), "ulysses", implementation, (size,))


@DTYPES
@pytest.mark.parametrize("implementation", ["aten", "reference"])
@pytest.mark.parametrize("shared", ["q", "k", "v"])
def test_rows_that_share_memory(shared, implementation, dtype):
    """Expanded tensors stay so on one rank and are copied on their way to others."""
    case = replace(PLAIN, length=70, hq=4, d=4, vd=4, dtype=dtype)
    whole_tensors = case.tensors()

    def fn(group):
        layout = case.layout(group.size)
        mine = [x[:, layout.positions(group.rank)] for x in whole_tensors]
        rows = mine["qkv".index(shared)].shape[1]
        first = whole_tensors["qkv".index(shared)][:, :1]
        mine["qkv".index(shared)] = first.expand(-1, rows, -1, -1)
        assert mine["qkv".index(shared)].stride(1) == 0
        *leaves, dout = mine
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = seqpar.attention(*leaves, case.plan(group, "ulysses", implementation))
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    one = simulate(1, fn)[0]
    for size in (2, 4):
        many = [torch.cat(shares, 1) for shares in zip(*simulate(size, fn), strict=True)]
        for name, x, y in zip(case.names, one, many, strict=True):
            assert torch.equal(x, y), f"{name} differs with {size} ranks: {(x - y).abs().max()}"


def test_a_kv_head_of_many_query_heads():
    """Eight gradients added one after another have other bits than torch's sum of them; three have not."""
    case = replace(PLAIN, length=40, hq=8, hkv=1, dtype=torch.float32)
    check(simulate, case, "ulysses", None, (2, 5))


def test_ulysses_without_being_asked():
    case = replace(PLAIN, length=70, hq=6, dtype=torch.float32, invariant=None)
    check(simulate, case, "ulysses", None, (4, 5))


@DTYPES
@pytest.mark.parametrize("terms", [{}, TERMS], ids=["plain", "every term"])
@pytest.mark.parametrize("window", [None, 100])
def test_the_contiguous_causal_ring(window, terms, dtype):
    case = replace(PLAIN, length=460, multiple_of=64, window=window, dtype=dtype, **terms)
    check(simulate, case, "ring", "reference", sizes_for(dtype, (2, 5, 8) if window else SIZES))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_the_ring_whatever_travels_backward(heads):
    """With as many kv heads the queries travel, with fewer the keys; documents cut the rounds short."""
    documents = (0, 30, 200, 200, 330, 460)
    for more in ({}, {"documents": documents}):
        case = replace(PLAIN, length=460, multiple_of=64, dtype=torch.float32, **more)
        case = replace(case, hq=heads[0], hkv=heads[1])
        check(simulate, case, "ring", "reference", (3, 4, 7))


@DTYPES
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped", "balanced"])
def test_all_gather_in_any_layout_cut_at_tiles(kind, dtype):
    case = replace(PLAIN, length=460, kind=kind, multiple_of=64, dtype=dtype)
    if kind in ("contiguous", "striped"):
        case = replace(case, causal=kind != "contiguous", **TERMS)
    sizes = sizes_for(dtype, SIZES if kind == "zigzag" else (2, 5, 8))
    check(simulate, case, "allgather", "reference", sizes)


@DTYPES
def test_all_gather_where_ranks_hold_rows_out_of_order(dtype):
    """Slopes and sinks add all rows in the order of positions, on one rank too."""
    case = replace(PLAIN, length=460, kind="unsorted", multiple_of=64, dtype=dtype, **TERMS)
    check(simulate, case, "allgather", "reference", sizes_for(dtype, (2, 3)))
    plain = replace(case, causal=False, softcap=None, alibi=False, sinks=False, dropout=0.0, d=1)
    check(simulate, replace(plain, vd=1), "allgather", "reference", (3,))


def test_all_gather_with_keys_of_another_length():
    case = replace(PLAIN, length=200, kv_length=330, multiple_of=64, kind="zigzag", causal=False)
    check(simulate, replace(case, dtype=torch.float32), "allgather", "reference", (3, 8))


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather"])
def test_triton_kernels(strategy):
    """Interpreted where there is no GPU: three tiles, the last of six rows, one for each rank."""
    case = replace(PLAIN, length=70, multiple_of=32, dtype=torch.float32, hq=2, hkv=1, **TERMS)
    check(simulate, case, strategy, "triton", (3,))


@DTYPES
@pytest.mark.parametrize("strategy", ["ring", "ulysses", "allgather"])
def test_over_processes(worlds, strategy, dtype):
    case = replace(PLAIN, length=200, multiple_of=64, dtype=dtype, hq=6, **TERMS)

    def run(size, *args):
        return worlds.run(size, *args)

    check(run, case, strategy, "reference", (2, 5))


REFUSED = {
    "a ring that sees ahead": (
        {"strategy": "ring", "mask": Mask()},
        r"only with a causal mask, .* got causal=False",
    ),
    "shards not cut at tiles": (
        {"strategy": "ring", "multiple_of": 32},
        r"make the layout with multiple_of=64",
    ),
    "striped by the position": (
        {"strategy": "allgather", "kind": "striped", "multiple_of": 1},
        r"multiple_of=64",
    ),
    "a mesh": (
        {"strategy": "mesh"},
        r"strategy 'mesh' cannot .* \('ring', 'ulysses', 'allgather'\)",
    ),
    "a hybrid": ({"strategy": "hybrid"}, "strategy 'hybrid' cannot"),
    "aten cut in pieces": (
        {"strategy": "ring", "implementation": "aten"},
        r"'aten' adds in an order that depends .* take 'reference' or 'triton'",
    ),
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_keep_bits_is_refused(what, size):
    change, message = REFUSED[what]

    def fn(group):
        options = {"strategy": "ring", "mask": Mask(causal=True), "invariant": True, **change}
        make = {"zigzag": seqpar.zigzag, "striped": seqpar.striped}.get(
            options.pop("kind", ""), seqpar.contiguous
        )
        layout = make(300, group.size, multiple_of=options.pop("multiple_of", 64))
        if options["strategy"] in ("mesh", "hybrid"):
            options["grid"] = group.grid(ulysses=1)
        q = torch.ones(1, layout.rows[group.rank], 2, 4)
        seqpar.attention(q, q, q, seqpar.Plan(group, layout, **options))

    if size == 1 and what in ("shards not cut at tiles", "striped by the position"):
        simulate(size, fn)  # one rank's shard is the whole sequence
        return
    with pytest.raises((ValueError, NotImplementedError), match=message):
        simulate(size, fn)


def test_the_implementation_is_chosen_to_keep_bits():
    case = replace(PLAIN, length=200, multiple_of=64, dtype=torch.float32)
    named = simulate(2, on_each_rank, case, "ring", "reference")
    chosen = simulate(2, on_each_rank, case, "ring", None)
    assert all(torch.equal(x, y) for x, y in zip(named[1], chosen[1], strict=True))


@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
def test_a_ring_looks_at_spans_and_not_at_the_name_of_a_layout(name):
    """A layout of one's own may be called contiguous and not be; one rank has any order."""

    def fn(group):
        layout = replace(zigzag(256, group.size, multiple_of=64), kind=name)
        x = torch.ones(1, layout.rows[group.rank], 1, 8)
        plan = Plan(group, layout, Mask(causal=True), invariant=True, implementation="reference")
        return seqpar.attention(x, x, x, plan)

    assert simulate(1, fn)[0].shape[1] == 256
    with pytest.raises((ValueError, seqpar.DesyncError), match="a contiguous layout and keys of"):
        simulate(2, fn)


def test_by_default_bits_are_invariant_where_that_costs_nothing():
    """Who is asked for by name gives what the same one gives that was chosen: on CPU that is aten."""
    x = torch.ones(1, 8, 2, 8)
    for implementation, expected in ((None, True), ("aten", True), ("reference", True)):
        plan = Plan(
            seqpar.Group.alone(),
            contiguous(8, 1),
            strategy="ulysses",
            implementation=implementation,
        )
        assert resolve(plan, x, x).invariant is expected
        assert resolve(replace(plan, strategy="ring"), x, x).invariant is False
