"""What a `Mask` takes, and where rows stand over keys of another number."""

import pickle
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import Group, KVCache, Mask, Plan, Score, attention, contiguous, simulate
from seqpar.calls import resolve
from seqpar.comm import silent
from seqpar.testing import Case, errors_on_rank

SIDES = st.none() | st.integers(0, 9)
# Numbers of queries and keys, and windows, as the tests of flash-attn have them, smaller.
LENGTHS = [(13, 23), (16, 25), (23, 13), (25, 16), (24, 24), (1, 9), (9, 1)]
WINDOWS = [(None, None), (3, 0), (0, 4), (2, 5), (None, 3), (4, None), (0, 0), (30, 30)]


@given(st.booleans(), st.tuples(SIDES, SIDES), st.integers(0, 12), st.integers(0, 12))
def test_sides_of_a_window_are_those_of_flash_attn(causal, sides, row, col):
    """Row i sees column j where i - left <= j <= i + right, and none after i where it is causal."""
    left, right = sides
    band = Mask(causal, sides).layers[0].band(row, col, 1)
    seen = (left is None or col >= row - left) and (right is None or col <= row + right)
    assert band.count(1, 1) == (seen and not (causal and col > row))


def test_a_number_of_keys_counts_the_row_itself():
    for causal in (True, False):
        assert Mask(causal, 4).sides == Mask(causal, (3, 3)).sides == (3, 0 if causal else 3)


def test_open_sides_are_no_window():
    for window in ((None, None), (-1, -1), [-1, None]):
        assert Mask(window=window) == Mask()
        assert hash(Mask(window=window)) == hash(Mask())
    assert Mask(window=(-1, 2)) == Mask(window=[None, 2]) != Mask(window=(2, None))
    assert hash(Mask(window=(0, None))) != hash(Mask(window=(None, 0)))


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"window": (1, 2, 3)}, TypeError, r"a pair \(left, right\) or None"),
        ({"window": (1.0, 2)}, TypeError, "the sides of a window must be integers"),
        ({"window": (True, 2)}, TypeError, "the sides of a window must be integers"),
        ({"window": (1, -2)}, ValueError, "0 or more keys"),
        ({"align": "center"}, ValueError, "align must be one of"),
    ],
)
def test_what_it_refuses(wrong, kind, words):
    with pytest.raises(kind, match=words):
        Mask(**wrong)


@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from(["top-left", "bottom-right"]))
def test_where_rows_stand_over_keys(num_rows, num_cols, align):
    mask = Mask(causal=True, align=align).aligned(num_rows, num_cols)
    apart = num_cols - num_rows if align == "bottom-right" else 0
    rows, cols = mask.shift
    assert rows - cols == apart
    assert min(rows, cols) == 0, "no position is negative"
    assert mask == pickle.loads(pickle.dumps(mask))
    seen = mask.layers[0].band(*mask.shift, 1)
    assert seen.count(num_rows, num_cols) == sum(
        j <= i + apart for i, j in product(range(num_rows), range(num_cols))
    )
    full = Mask(align=align)
    assert full.aligned(num_rows, num_cols) is full, "where nothing depends on it"
    assert full.aligned(num_rows, num_cols, positions=True).shift == mask.shift


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("align", ["top-left", "bottom-right"])
def test_windows_of_two_sides_over_keys_of_another_length(lengths, align):
    """Every one a direct call, in three strategies of three ranks, out and gradients."""
    for causal, window, strategy in product(
        (True, False), WINDOWS, ("ring", "ulysses", "allgather")
    ):
        case = Case(
            lengths[0], hq=2, hkv=1, d=4, vd=3, causal=causal, window=window, kind="zigzag",
            kv_length=lengths[1], align=align,
        )  # fmt: skip
        for errors in simulate(3, errors_on_rank, case, strategy):
            assert not errors.failures, (causal, window, strategy)


UNSAID = {
    "causal": (Mask(causal=True), Score()),
    "a window": (Mask(window=(2, 2)), Score()),
    "ALiBi": (Mask(), Score(alibi_slopes=torch.ones(2))),
}


def unsaid(group, mask, score):
    plan = Plan(group, contiguous(6, group.size), mask, score, kv_layout=contiguous(9, group.size))
    x = torch.zeros(1, plan.layout.rows[group.rank], 2, 4)
    y = torch.zeros(1, plan.keys.rows[group.rank], 2, 4)
    with pytest.raises(ValueError, match=r"6 query and 9 key positions.*top-left.*bottom-right"):
        attention(x, y, y, plan)
    return group.traffic.total.bytes


@pytest.mark.parametrize("what", UNSAID)
def test_what_depends_on_where_rows_stand_must_say_so(what):
    """On every rank, before a message."""
    assert simulate(3, unsaid, *UNSAID[what]) == [0, 0, 0]


def test_what_does_not_depend_on_it_need_not_say():
    group = silent(0, 2)
    plan = Plan(group, contiguous(6, 2), kv_layout=contiguous(9, 2))
    x, y = torch.zeros(1, 3, 2, 4), torch.zeros(1, 5, 2, 4)
    assert resolve(plan, x, y).mask == Mask()
    same = Plan(group, contiguous(6, 2), Mask(causal=True, align="bottom-right"))
    assert resolve(same, x, x).mask.shift == (0, 0), "of one length there is nothing to say"


POISONED = [
    "ring",
    "ulysses",
    "allgather",
    "materialised_rows",
    "materialised_columns",
    "materialised_depth",
]


def with_poison(group, strategy, num_rows, num_cols, poisoned):
    """Out and gradients of whole tensors where the last value is NaN and the gradient of row 0 infinite."""
    rows, cols = contiguous(num_rows, group.size), contiguous(num_cols, group.size)
    mask = Mask(causal=True, align="bottom-right")
    plan = Plan(group, rows, mask, kv_layout=cols, strategy=strategy, implementation="reference")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 4, generator=generator) for n in (num_rows, num_cols, num_cols))
    dout = torch.randn(1, num_rows, 2, 4, generator=generator)
    if poisoned:
        v[0, -1], dout[0, 0] = float("nan"), float("inf")
    mine, keys = rows.positions(group.rank), cols.positions(group.rank)
    leaves = [x.requires_grad_() for x in (q[:, mine], k[:, keys], v[:, keys])]
    out = attention(*leaves, plan)
    grads = torch.autograd.grad(out, leaves, dout[:, mine])
    return out.detach(), grads[2]


@pytest.mark.parametrize("lengths", [(6, 9), (9, 6)], ids=str)
@pytest.mark.parametrize("strategy", POISONED)
def test_poison_reaches_what_sees_it_wherever_rows_stand(strategy, lengths):
    results = (simulate(2, with_poison, strategy, *lengths, poisoned) for poisoned in (False, True))
    clean, found = ([torch.cat(x, 1) for x in zip(*ranks, strict=True)] for ranks in results)
    num_rows, num_cols = lengths
    out, dv = found
    assert out[:, -1].isnan().all()
    assert torch.equal(out[:, :-1], clean[0][:, :-1]), "the other rows stand before the last key"
    seen = max(num_cols - num_rows + 1, 0)  # keys that row 0 sees
    assert not dv[:, :seen].isfinite().any()
    torch.testing.assert_close(dv[:, seen:], clean[1][:, seen:], rtol=0, atol=1e-6)


def test_a_cache_has_its_queries_over_the_last_keys():
    x = torch.zeros(1, 6, 2, 4)
    with pytest.raises(ValueError, match="stand over its last keys"):
        KVCache(Group.alone(), contiguous(6, 1), x, x, mask=Mask(causal=True, align="top-left"))
    resolved = Mask(causal=True, align="bottom-right").aligned(3, 6)
    cache = KVCache(Group.alone(), contiguous(6, 1), x, x, mask=resolved)
    assert cache._mask == Mask(causal=True)
