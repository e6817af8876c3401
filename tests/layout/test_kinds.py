"""Kinds of layouts: a name, the function and the layout itself say the same; what says nothing is refused."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seqpar
from seqpar import DesyncError, Mask, simulate
from seqpar.layout import check_kind, layout_of
from seqpar.testing.refusals import check_told, told

FUNCTIONS = {"contiguous": seqpar.contiguous, "zigzag": seqpar.zigzag, "striped": seqpar.striped}
MASK = Mask(causal=True, documents=(0, 3, 3, 10))


def batch_of(length=10, width=2):
    return {"input_ids": torch.arange(width * length).view(width, length)}


@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.integers(0, 20),
    st.integers(1, 6),
    st.sampled_from([1, 3]),
)
def test_a_name_its_function_and_its_layout_are_one_kind(name, length, size, multiple_of):
    want = FUNCTIONS[name](length, size, multiple_of=multiple_of)
    for kind in (name, FUNCTIONS[name], want, lambda n, p, *, multiple_of: want):
        assert layout_of(kind, length, size, multiple_of=multiple_of) is not None
        assert layout_of(kind, length, size, multiple_of=multiple_of) == want


@pytest.mark.parametrize("kind", ["balanced", seqpar.balanced, partial(seqpar.balanced, mask=MASK)])
def test_the_balanced_one_is_given_the_mask(kind):
    want = seqpar.balanced(10, 3, MASK)
    assert want != seqpar.zigzag(10, 3)
    assert layout_of(kind, 10, 3, mask=MASK) == want


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_batches_are_sharded_by_any_kind(name):
    """So are those of a loader; and padded ones, whose layout is of the padded length."""
    kinds = name, FUNCTIONS[name], FUNCTIONS[name](12, 3)

    def fn(group):
        options = {"pad_to_multiple_of": 4, "pad_token_id": 0}
        for kind in kinds:
            shard, layout = seqpar.shard_batch(batch_of(), group, kind, **options)
            (loaded, other), *_ = seqpar.ShardedLoader([batch_of()], group, kind, **options)
            assert torch.equal(shard["input_ids"], loaded["input_ids"])
            yield shard["input_ids"].tolist(), layout == other, layout

    for first, *others in simulate(3, lambda group: list(fn(group))):
        assert all(other == first for other in others)
        assert first[1]


def test_ranks_may_say_the_same_in_different_ways_but_not_different_things():
    def fn(group, *kinds):
        seqpar.shard_batch(batch_of(), group, kinds[group.rank])

    simulate(2, fn, "zigzag", seqpar.zigzag)
    own = seqpar.Layout("zigzag", 10, 2, seqpar.striped(10, 2).spans)
    with pytest.raises(
        DesyncError, match=r"kind='zigzag'.* on rank 0, .*kind='striped'.* on rank 1"
    ):
        simulate(2, fn, "zigzag", "striped")
    with pytest.raises(DesyncError, match="spans of layout is"):
        simulate(2, fn, "zigzag", own)


REFUSED = {
    "another name": ("round", r"ValueError: kind must be one of \('contiguous', .*, got 'round'$"),
    "a slip": ("zigzagg", "ValueError: kind must be one of .*got 'zigzagg': did you mean 'zigzag'"),
    "a number": (3, "TypeError: kind must be one of .* or a seqpar.Layout, got 3"),
    "no mask": ("balanced", "ValueError: kind 'balanced' evens out .* pass it as mask="),
    "no mask for the function": (seqpar.balanced, "ValueError: kind 'balanced' evens out"),
    "a layout of another length": (
        seqpar.striped(9, 3),
        r"ValueError: the sequences have 10 positions, got Layout\(.*length=9.*such as 'zigzag'",
    ),
    "a layout of other ranks": (
        seqpar.zigzag(10, 4),
        "ValueError: .* for the 3 ranks of the group",
    ),
    "a function that makes no layout": (
        lambda n, p, *, multiple_of: n,
        "TypeError: .* must make a seqpar.Layout, got 10",
    ),
    "a function that makes another layout": (
        lambda n, p, *, multiple_of: seqpar.zigzag(n + 1, p),
        "ValueError: the sequences have 10 positions, got .*length=11",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("only", [None, 1])
def test_a_kind_that_one_rank_refuses_all_refuse(what, only):
    kind, pattern = REFUSED[what]

    def fn(group):
        mine = kind if only in (None, group.rank) else "zigzag"
        text = told(lambda: seqpar.shard_batch(batch_of(), group, mine))
        seqpar.shard_batch(batch_of(), group)  # and nothing is left on the wire
        return text

    texts = simulate(3, fn)
    if only is not None:  # the others quote it, and say more behind it
        pattern = pattern.removesuffix("$")
    check_told(texts, pattern)


def test_a_layout_that_is_cut_elsewhere_is_refused():
    assert layout_of(seqpar.zigzag(16, 2, multiple_of=4), 16, 2, multiple_of=4).is_cut_at(4)
    for layout in (seqpar.contiguous(10, 4), seqpar.striped(16, 4)):
        with pytest.raises(ValueError, match="is not cut at multiples of 4 positions only"):
            layout_of(layout, layout.length, 4, multiple_of=4)
    assert layout_of(seqpar.striped(16, 4), 16, 4) == seqpar.striped(16, 4)


def test_a_wrong_kind_fails_where_a_loader_is_made():
    """And not at its first batch, perhaps minutes later."""
    alone = seqpar.Group.alone()
    with pytest.raises(ValueError, match="did you mean 'contiguous'"):
        seqpar.ShardedLoader([], alone, "contigous")
    with pytest.raises(TypeError, match="got None"):
        check_kind(None)
    assert list(seqpar.ShardedLoader([], alone, "balanced")) == [], "the batch may bring its mask"
