"""What a cache does between attentions: where it puts rows, what it forgets, reorders and refuses."""

import pytest
import torch

import seqpar
from seqpar import KVCache, Mask, Score, contiguous, simulate, zigzag
from seqpar.calls import Shape
from seqpar.comm import Count
from seqpar.decode import decode_volume
from seqpar.decode.rows import Grown, Held, deal, extended
from seqpar.layout import Layout, Span
from seqpar.testing import Case, oracle
from seqpar.testing.budget import Budget
from seqpar.testing.refusals import check_refused, refusal

EXACT = {"rtol": 1e-11, "atol": 1e-11}
LENGTH = 12


def filled(group, length=LENGTH, batch=2, dtype=torch.float64, **options):
    """A causal cache with 4 query and 2 kv heads, and the whole q, k, v with 20 positions more."""
    case = Case(length + 20, 4, 2, d=4, vd=3, batch=batch, dtype=dtype)
    q, k, v, _ = case.tensors()
    layout = zigzag(length, group.size)
    mine = layout.positions(group.rank)
    return KVCache(group, layout, k[:, mine], v[:, mine], **options), q, k, v


def one_device(q, k, v, num_queries):
    """The last rows of causal attention."""
    n = k.shape[1]
    terms = oracle.Terms(q.shape[3] ** -0.5)
    return oracle.attention(q[:, :n], k, v, oracle.visible(n, True, None), terms)[:, -num_queries:]


@pytest.mark.parametrize(
    ("rows", "owners"),
    [
        ((4, 4, 4), [0, 1, 2, 0, 1, 2, 0]),
        ((5, 4, 4), [1, 2, 0, 1, 2, 0, 1]),
        ((0, 0, 3), [0, 1, 0, 1, 0, 1, 0]),
        ((7,), [0] * 7),
    ],
)
def test_each_position_goes_to_the_lowest_of_the_emptiest_ranks(rows, owners):
    assert deal(rows, 7) == owners


def test_progressions_of_positions_are_one_span():
    spans = ()
    for position in (0, 3, 6, 9, 10, 11, 30):
        spans = extended(spans, position)
    assert spans == (Span(0, 4, 3), Span(10, 2), Span(30, 1))


def test_appending_copies_a_row_at_most_twice():
    """Counted: the rows that growing moves, for a thousand positions one by one."""
    moved = []

    class Counting(Grown):
        def _grow(self, capacity):
            moved.append(self.num_rows)
            super()._grow(capacity)

    one = torch.zeros(1, 1, 1, 2)
    grown = Counting(Held(one, one, (Span(0, 1),)))
    for n in range(1000):
        grown.append(one, one, [n])
        assert grown.held.k.shape[1] == n + 1
    assert sum(moved) < 2 * 1000
    assert len(moved) < 12


def uneven(group):
    spans = ((Span(0, 5),), (), (Span(5, 1),))
    x = torch.ones(1, (5, 0, 1)[group.rank], 1, 2)
    cache = KVCache(group, Layout("own", 6, 3, spans), x, x)
    found = []
    for _ in range(10):
        cache.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
        found.append(cache.rows)
    return found


def test_shards_become_even():
    for found in simulate(3, uneven):
        assert found[3] == (5, 3, 2)
        assert found[-1] == (6, 5, 5)


def bytes_of_a_token(group, length):
    cache, q, k, v = filled(group, length)
    group.traffic.reset()
    at = slice(length, length + 1)
    cache.step(q[:, at], k[:, at], v[:, at])
    return group.traffic.total


def test_bytes_of_a_token_do_not_depend_on_the_length(worlds):
    """By hand, P = 4: 2 sequences x 4 heads = 8 rows of out and lse, 2 merged by each rank."""
    expected = Count(6 * (3 + 1) + 2 * 3 * 3, 8 * (6 * (3 + 1) + 2 * 3 * 3))
    assert decode_volume(1, 0, 4, Shape(2, 4, 2, 4, 3, torch.float64)) == expected
    half = decode_volume(1, 0, 4, Shape(2, 4, 2, 4, 3, torch.bfloat16))
    assert half.bytes == 4 * 6 * (3 + 1) + 2 * 2 * 3 * 3
    for length in (8, 160):
        assert simulate(4, bytes_of_a_token, length) == [expected] * 4
        assert worlds.run(4, bytes_of_a_token, length) == [expected] * 4


def draft(group):
    """Three drafted tokens, of which one is accepted, then one more; and the last queries."""
    cache, q, k, v = filled(group)
    wrong = torch.full_like(k[:, :2], 9.0), torch.full_like(v[:, :2], 9.0)
    new = slice(LENGTH, LENGTH + 1)
    drafted = [torch.cat((x[:, new], y), dim=1) for x, y in zip((k, v), wrong, strict=True)]
    cache.step(q[:, LENGTH : LENGTH + 3], *drafted)
    cache.truncate(LENGTH + 1)
    new = slice(LENGTH + 1, LENGTH + 2)
    return cache.rows, cache.step(q[:, LENGTH : LENGTH + 2][:, 1:], k[:, new], v[:, new])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_rejected_drafts_leave_nothing_behind(size):
    _, q, k, v = filled(seqpar.Group.alone())
    expected = one_device(q, k[:, : LENGTH + 2], v[:, : LENGTH + 2], 1)
    for rows, out in simulate(size, draft):
        torch.testing.assert_close(out, expected, **EXACT)
        assert sum(rows) == LENGTH + 1
        assert max(rows) - min(rows) <= 1


def reordered(group, indices):
    cache, q, k, v = filled(group)
    new = slice(LENGTH, LENGTH + 1)
    cache.append(k[:, new], v[:, new])
    cache.reorder(indices)
    order = torch.as_tensor(indices)
    new = slice(LENGTH + 1, LENGTH + 3)
    return cache.step(q[order, new], k[order, new], v[order, new])


@pytest.mark.parametrize("indices", [[1, 0], [1, 1, 0], torch.tensor([0])])
def test_beams_may_change_places(indices):
    _, q, k, v = filled(seqpar.Group.alone())
    k, v = k[:, : LENGTH + 3], v[:, : LENGTH + 3]
    expected = one_device(q, k, v, 2)[torch.as_tensor(indices)]
    for out in simulate(3, reordered, indices):
        torch.testing.assert_close(out, expected, **EXACT)


def long_document(group, documents, num):
    cache, q, k, v = filled(group, mask=Mask(causal=True, documents=documents))
    new = slice(LENGTH, LENGTH + num)
    return cache.step(q[:, new], k[:, new], v[:, new])


def test_an_empty_last_document_is_a_new_one():
    """(0, 5, 12): new positions see from 5 on. (0, 5, 12, 12): from 12 on."""
    _, q, k, v = filled(seqpar.Group.alone())
    for documents, first in (((0, 5, 12), 5), ((0, 5, 12, 12), 12)):
        seen = slice(first, LENGTH + 2)
        expected = one_device(q[:, first:], k[:, seen], v[:, seen], 2)
        for out in simulate(3, long_document, documents, 2):
            torch.testing.assert_close(out, expected, **EXACT)


def narrow(group, dtype, implementation):
    cache, q, k, v = filled(group, dtype=dtype, implementation=implementation)
    new = slice(LENGTH, LENGTH + 3)
    return cache.step(q[:, new], k[:, new], v[:, new])


@pytest.mark.parametrize(
    ("dtype", "implementation"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, "reference"),
        (torch.float32, "triton"),
    ],
)
def test_other_types_and_kernels_are_within_the_budget(dtype, implementation):
    case = Case(LENGTH + 3, 4, 2, d=4, vd=3, batch=2, dtype=dtype)
    q, k, v, dout = (
        x[:, : LENGTH + 3] for x in Case(LENGTH + 20, 4, 2, 4, 3, 2, dtype=dtype).tensors()
    )
    seen = oracle.visible(LENGTH + 3, True, None)
    budget = Budget.of(q, k, v, dout, seen, case.terms())
    for out in simulate(3, narrow, dtype, implementation):
        assert out.dtype == dtype
        error = (out.double() - budget.expected[0][:, -3:]).abs().max()
        assert error <= budget.allowed[0]


def test_other_attention_may_use_the_cache_of_a_memory():
    """Cross attention: a full mask, nothing appended, any number of queries up to its length."""

    def fn(group):
        cache, q, *_ = filled(group, mask=Mask())
        return cache.attend(q[:, :5])

    _, q, k, v = filled(seqpar.Group.alone())
    everything = torch.ones(5, LENGTH, dtype=torch.bool)
    expected = oracle.attention(
        q[:, :5], k[:, :LENGTH], v[:, :LENGTH], everything, oracle.Terms(0.5)
    )
    for out in simulate(3, fn):
        torch.testing.assert_close(out, expected, **EXACT)


def call(group, **change):
    """A cache, and a step, a truncation or a reordering; this rank may do something else."""
    length, dtype = change.get("length", LENGTH), change.get("dtype", torch.float32)
    layout = change.get("layout", zigzag(LENGTH, group.size))
    x = torch.ones(2, zigzag(length, group.size).rows[group.rank], 2, 4, dtype=dtype)
    options = {name: change[name] for name in ("mask", "score", "implementation") if name in change}
    cache = KVCache(group, layout, change.get("k", x), x, **options)
    q, k = torch.ones(2, change.get("num", 1), 4, 4), torch.ones(2, change.get("num", 1), 2, 4)
    if "attend" in change:
        return cache.attend(change["attend"])
    out = cache.step(change.get("q", q), change.get("new_k", k), change.get("new_v", k))
    cache.truncate(change.get("cut", LENGTH))
    cache.reorder(change.get("indices", [1, 0]))
    return out


ONE_RANK = {  # what rank 1 alone does -> what every message must say
    "layout": (
        {"layout": contiguous(LENGTH, 3)},
        r"layout is .*zigzag.* on ranks 0, 2, .*contiguous",
    ),
    "rows": (
        {"length": 15},
        r"rank 1 of 3 must hold 4 of the 12 positions \(zigzag\), got k \(2, 5",
    ),
    "dtype": ({"dtype": torch.bfloat16}, r"dtype is torch.float32 on ranks 0, 2, torch.bfloat16"),
    "mask": ({"mask": Mask()}, r"mask is Mask\(causal=True\) on ranks 0, 2, Mask\(\) on rank 1"),
    "documents": (
        {"mask": Mask(causal=True, documents=(0, 11))},
        "documents must end where the prefill does, at 12, got 11",
    ),
    "sinks": (
        {"score": Score(sinks=torch.zeros(4))},
        r"sinks is None on ranks 0, 2, torch.float32 on rank 1",
    ),
    "implementation": ({"implementation": "reference"}, r"implementation is 'aten' on ranks 0, 2"),
    "num of queries": ({"num": 2}, r"positions is 1 on ranks 0, 2, 2 on rank 1"),
    "cut": ({"cut": LENGTH + 1}, r"positions is 12 on ranks 0, 2, 13 on rank 1"),
    "cut of the prefill": ({"cut": 3}, r"cache of 13 positions, 12 of them .* cannot be cut to 3"),
    "indices": ({"indices": [0, 1]}, r"indices is \[1, 0\] on ranks 0, 2, \[0, 1\] on rank 1"),
    "indices of no entry": ({"indices": [2, 0]}, r"must be of the batch of 2, got \[2, 0\]"),
    "another call": (
        {"attend": torch.ones(2, 1, 4, 4)},
        r"'KVCache.step' on ranks 0, 2, 'KVCache.attend'",
    ),
    "a gradient": (
        {"q": torch.ones(2, 1, 4, 4, requires_grad=True)},
        r"a cache has no gradients, and q requires one; decode under torch.no_grad\(\)",
    ),
}
ALL_RANKS = {
    "layout of other ranks": ({"layout": zigzag(LENGTH, 2)}, "for the 3 ranks of the group"),
    "not a layout": ({"layout": 12}, "layout must be a seqpar.Layout, got 12"),
    "a mask_mod": (
        {"mask": Mask(mask_mod=torch.eq)},
        "a cache takes neither a mask_mod, a score_mod nor a bias",
    ),
    "a score_mod": ({"score": Score(score_mod=torch.add)}, "neither a mask_mod, a score_mod nor"),
    "a bias": ({"score": Score(bias=torch.zeros(1))}, "neither a mask_mod, a score_mod nor a bias"),
    "documents of two sequences": (
        {"mask": Mask(documents=((0, 12), (0, 11)))},
        r"boundaries of its keys alone, got a pair",
    ),
    "joined documents": (
        {"mask": Mask(True) | Mask(documents=(0, 12))},
        "documents that `&` or `|` joined .* end",
    ),
    "not a mask": ({"mask": True}, "mask must be a seqpar.Mask, got True"),
    "k not a tensor": ({"k": None}, "k must be a tensor, got NoneType"),
    "k of integers": ({"k": torch.ones(2, 4, 2, 4).long()}, "k must be floating point"),
    "k of other heads": ({"k": torch.ones(2, 4, 3, 4)}, "one batch, length and some heads"),
    "new k of other heads": (
        {"new_k": torch.ones(2, 1, 1, 4)},
        r"new k must be \[2 t 2 4\], got \(2, 1, 1",
    ),
    "new v of other length": ({"new_v": torch.ones(2, 2, 2, 4)}, r"new v must be \[2 t 2 4\]"),
    "q of other heads": (
        {"q": torch.ones(2, 1, 3, 4)},
        r"q must be \[2 t hq 4\] with hq a multiple of 2",
    ),
    "q in 3-D": ({"q": torch.ones(2, 1, 4)}, "q must be 4-D"),
    "q of another type": ({"q": torch.ones(2, 1, 4, 4).double()}, "must have one dtype and device"),
    "more queries than positions": (
        {"attend": torch.ones(2, 13, 4, 4)},
        "queries are the last positions of the 12 in the cache, got 13; append first",
    ),
    "sinks of other heads": (
        {"score": Score(sinks=torch.zeros(2))},
        r"sinks must have one entry for each of the 4 query heads, got \(2,\)",
    ),
    "what the implementation lacks": (
        {"implementation": "aten", "score": Score(softcap=2.0)},
        "'aten' has no softcap; 'reference' does",
    ),
    "cut in halves": ({"cut": 12.5}, "length must be an integer, got 12.5"),
    "indices in halves": ({"indices": [0.5]}, r"indices must be integers \[n\], got \[0.5\]"),
}


@pytest.mark.parametrize("what", ONE_RANK)
def test_what_one_rank_does_wrong_all_refuse(what):
    change, pattern = ONE_RANK[what]
    check_refused(simulate(3, refusal, call, change, 1), pattern)


@pytest.mark.parametrize("what", ALL_RANKS)
def test_what_all_do_wrong_all_refuse(what):
    change, pattern = ALL_RANKS[what]
    check_refused(simulate(3, refusal, call, change), pattern)


@pytest.mark.parametrize("what", ["rows", "num of queries", "a gradient"])
def test_what_one_process_does_wrong_all_refuse(worlds, what):
    change, pattern = ONE_RANK[what]
    check_refused(worlds.run(3, refusal, call, change, 1), pattern)


def test_parameters_are_no_hindrance_without_gradients():
    sinks = torch.zeros(4, requires_grad=True)

    def fn(group):
        with torch.no_grad():
            return call(
                group, score=Score(sinks=sinks), q=torch.ones(2, 1, 4, 4, requires_grad=True)
            )

    assert not any(out.requires_grad for out in simulate(2, fn))


@pytest.mark.parametrize("new", [1, 3])
def test_a_cache_filled_in_inference_mode_grows_outside_of_it(new):
    """What was made there cannot be written to, and ranks that need not write would go on alone."""

    def fn(group):
        with torch.inference_mode():
            cache, q, k, v = filled(group, 3)
            cache.append(k[:, 3:4], v[:, 3:4])
        at = slice(4, 4 + new)
        return cache.step(q[:, at], k[:, at], v[:, at])

    _, q, k, v = simulate(1, filled, 3)[0]
    expected = one_device(q[:, : 4 + new], k[:, : 4 + new], v[:, : 4 + new], new)
    for out in simulate(3, fn):
        torch.testing.assert_close(out, expected, **EXACT)
