"""A balanced layout spreads rows and work evenly whatever the documents, and cuts few of them."""

import random
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from seqpar.layout import Mask, balanced, contiguous, sees, zigzag

MASKS = [
    {"causal": True},
    {"causal": True, "window": 256},
    {"causal": True, "window": 4096},
    {},
    {"window": 512},
]


def keys_seen(mask, length):
    """How many keys each row sees, straight from the definition."""
    bounds = torch.tensor(mask.documents or (0, length))
    row = torch.arange(length)
    document = torch.searchsorted(bounds, row, right=True)
    first, last = bounds[document - 1], bounds[document] - 1
    if mask.causal:
        last = row
    if mask.window is not None:
        first, last = first.maximum(row - mask.window + 1), last.minimum(row + mask.window - 1)
    return last - first + 1


def loads(layout, mask):
    seen = keys_seen(mask, layout.length)
    return [int(seen[layout.positions(r)].sum()) for r in range(layout.size)]


def meetings(layout, mask):
    """Number of pairs (rank, owner) of which the rank sees something of the owner."""
    return sum(
        any(sees(mask, rows, cols) for rows in mine for cols in theirs)
        for mine in layout.spans
        for theirs in layout.spans
    )


def packed(lengths, length):
    """Boundaries of documents of these lengths, the last as long as fits."""
    bounds = [0]
    for n in lengths:
        bounds.append(min(length, bounds[-1] + max(1, int(n))))
    return (*(b for b in bounds if b < length), length)


def shuffled(rng, lengths):
    return rng.sample(lengths, len(lengths))


MIXES = {
    "lognormal": lambda rng, n, p: [rng.lognormvariate(6, 1) for _ in range(n // 100)],
    "heavy lognormal": lambda rng, n, p: [rng.lognormvariate(5.5, 2) for _ in range(n // 100)],
    "many short, few long": lambda rng, n, p: shuffled(
        rng, [rng.randint(20, 200) for _ in range(n // 150)] + [n // 12] * 4
    ),
    "one giant": lambda rng, n, p: shuffled(
        rng, [rng.randint(16, 80) for _ in range(n // 96)] + [n // 2]
    ),
    "equal": lambda rng, n, p: [n // 64] * 64,
    "one per rank": lambda rng, n, p: [-(-n // p)] * p,
    "uneven, one per rank": lambda rng, n, p: [rng.uniform(0.4, 1.6) * n / p for _ in range(p)],
    "single": lambda rng, n, p: [n],
    "tiny": lambda rng, n, p: [rng.randint(1, 2 * n // 500) for _ in range(n // 4)],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    ("length", "size"), [(2048, 2), (3001, 5), (4096, 16), (32768, 11), (131072, 16)]
)
def test_rows_and_work_are_within_five_percent(mix, length, size):
    rng = random.Random(f"{mix} {length} {size}")
    documents = packed(MIXES[mix](rng, length, size), length)
    for fields in MASKS:
        mask = Mask(**fields, documents=documents)
        layout = balanced(length, size, mask)
        for amounts in (loads(layout, mask), layout.rows):
            mean = sum(amounts) / size
            assert 0.95 * mean <= min(amounts), (fields, amounts)
            assert max(amounts) <= 1.05 * mean, (fields, amounts)


@st.composite
def cases(draw):
    length = draw(st.integers(1, 50) | st.integers(1, 1500))
    inner = draw(st.lists(st.integers(0, length), max_size=30))
    documents = draw(st.sampled_from([None, (0, *sorted(inner), length)]))
    window = draw(st.none() | st.integers(1, length + 2))
    return length, {"causal": draw(st.booleans()), "window": window, "documents": documents}


@given(cases(), st.integers(1, 17), st.sampled_from([1, 1, 2, 5, 16, 64, 2000]))
@example((503, {"causal": True, "window": 5, "documents": (0, 52, 253, 369, 374, 407, 503)}), 27, 1)
@example((2015, {"causal": True, "window": 280, "documents": (0, 1345, 2015)}), 7, 2)
@example((12916, {"causal": True, "window": 1898, "documents": (0, 12916)}), 37, 16)
def test_the_bounds_hold_for_any_sequence(case, size, multiple):
    length, fields = case
    mask = Mask(**fields)
    layout = balanced(length, size, mask, multiple_of=multiple)
    assert layout.kind == "balanced"
    assert layout.is_cut_at(multiple)
    assert sum(map(len, layout.spans)) <= 2 * size - 1 or mask == Mask(causal=True)
    held = [[span.start for span in spans] for spans in layout.spans if spans]
    assert all(starts == sorted(starts) for starts in held)
    assert held == sorted(held)

    work_of_blocks = [int(block.sum()) for block in keys_seen(mask, length).split(multiple)]
    num_blocks = [sum(-(-s.length // multiple) for s in spans) for spans in layout.spans]
    for amounts, largest in ((loads(layout, mask), max(work_of_blocks)), (num_blocks, 1)):
        mean = sum(amounts) / size
        assert max(abs(amount - mean) for amount in amounts) <= max(0.05 * mean, 2 * largest) + 1e-9


@given(st.integers(0, 300), st.integers(1, 9), st.integers(1, 20))
def test_without_documents_and_window_it_is_a_known_layout(length, size, multiple):
    for make, causal in ((zigzag, True), (contiguous, False)):
        layout = balanced(length, size, Mask(causal=causal), multiple_of=multiple)
        assert layout.spans == make(length, size, multiple_of=multiple).spans


def test_one_causal_document_becomes_a_zigzag():
    for size in (2, 3, 8):
        mask = Mask(causal=True, documents=(0, 64 * size))
        assert balanced(64 * size, size, mask).spans == zigzag(64 * size, size).spans


def test_documents_stay_whole_where_they_can():
    one_each = balanced(4000, 4, Mask(causal=True, documents=range(0, 4001, 1000)))
    assert one_each.spans == contiguous(4000, 4).spans
    for fields in MASKS:
        mask = Mask(**fields, documents=range(0, 32769, 64))
        layout = balanced(32768, 16, mask, multiple_of=32)
        assert meetings(layout, mask) == 16


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_documents_are_cut(seed):
    """Hardly any of many short ones; beside a giant that all ranks must share, about one cut a rank.

    Bounds are the worst of 40 seeds. Without arcs of whole documents there are 4 to 6 cuts in the first
    case, without arcs that cut once 14 in the second.
    """
    rng = random.Random(seed)
    lengths = [rng.uniform(10, 300) for _ in range(300)]
    short, giant = packed(lengths, 16384), (*packed(lengths, 8192), 16384)
    for documents, most in ((short, 1), (giant, 10)):
        layout = balanced(16384, 8, Mask(causal=True, documents=documents))
        begins = {span.start for spans in layout.spans for span in spans}
        assert len(begins - set(documents)) <= most


def test_a_windowed_rank_meets_its_neighbour_only():
    mask = Mask(causal=True, window=64, documents=(0, 8192))
    layout = balanced(8192, 8, mask)
    assert [len(spans) for spans in layout.spans] == [1] * 8
    assert meetings(layout, mask) == 8 + 7 < meetings(zigzag(8192, 8), mask)


def test_one_giant_document_is_cut_on_every_rank_and_hardly_another():
    """Ranks see earlier pieces of the giant only: half of all pairs, which a zigzag of it would fill."""
    mask = Mask(causal=True, documents=(*range(0, 16384, 64), *range(49152, 65537, 64)))
    layout = balanced(65536, 8, mask)
    of_giant = [sum(16320 <= p < 49152 for p in layout.positions(r).tolist()) for r in range(8)]
    assert all(of_giant)
    assert meetings(layout, mask) <= 8 * 9 // 2 + 4


def test_many_documents_on_many_ranks_take_little_work():
    """Counted in calls of functions; to fit each rank with all that is left took many times as many."""
    rng = random.Random(0)
    mask = Mask(causal=True, documents=(0, *sorted(rng.sample(range(1, 10**6), 999)), 10**6))
    counted = []
    sys.setprofile(lambda frame, event, _: counted.append(1) if event == "call" else None)
    try:
        layout = balanced(10**6, 256, mask)
    finally:
        sys.setprofile(None)
    assert len(counted) < 300_000
    assert max(layout.rows) <= 1.05 * 10**6 / 256


def test_wrong_requests_are_refused():
    with pytest.raises(
        ValueError, match=r"end where the sequence does, at 9, got 8; seqpar.padded_documents"
    ):
        balanced(9, 2, Mask(documents=(0, 4, 8)))
    with pytest.raises(ValueError, match="size >= 1"):
        balanced(8, 0, Mask(documents=(0, 8)))
    with pytest.raises(ValueError, match="got multiple_of=0"):
        balanced(8, 2, Mask(documents=(0, 8)), multiple_of=0)
    assert balanced(0, 3, Mask(documents=(0, 0))).rows == (0, 0, 0)
