"""Rows that were cut by one layout and attended as another's are noticed, where it costs nothing.

Both hold as many rows, so no shape shows it, and the results are wrong everywhere.
"""

import copy
import io
import logging

import pytest
import torch

import seqpar
from seqpar import Mask, contiguous, shard_sequence, unshard_sequence, zigzag
from seqpar.calls import announce
from seqpar.layout import Layout

LENGTH, SIZE = 12, 2
CUT, TAKEN = zigzag(LENGTH, SIZE), contiguous(LENGTH, SIZE)
REFUSED = r"was cut as .*zigzag.* and is taken for rows of .*contiguous"


def shards(group, width=4):
    x = torch.randn(1, LENGTH, 2, width, generator=torch.Generator().manual_seed(0))
    return shard_sequence(x, CUT, group.rank)


def refusals(fn):
    """What is raised on each rank."""

    def on_rank(group):
        try:
            return fn(group)
        except Exception as error:  # to be compared
            return f"{type(error).__name__}: {error}"

    return seqpar.simulate(SIZE, on_rank)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("module", [seqpar.RingAttention, seqpar.UlyssesAttention])
def test_a_shard_of_another_layout_is_refused_on_all_ranks(which, module):
    def attend(group):
        qkv = [shards(group).clone() for _ in range(3)]
        qkv[which] = shards(group)
        return module(group)(*qkv, TAKEN)

    for rank, said in enumerate(refusals(attend)):
        assert "qkv"[which] + " was cut as" in said, rank


def test_modules_look_at_their_rows():
    def attend(group):
        x = shard_sequence(torch.randn(1, LENGTH, 8), CUT, group.rank)
        mha = seqpar.MultiheadAttention(8, 2, attention=seqpar.RingAttention(group))
        with pytest.raises((ValueError, seqpar.DesyncError), match=f"query {REFUSED}"):
            mha(x, layout=TAKEN)
        with pytest.raises((ValueError, seqpar.DesyncError), match=f"value {REFUSED}"):
            mha(x.clone(), x.clone(), x, layout=TAKEN)
        with pytest.raises((ValueError, seqpar.DesyncError), match=f"x {REFUSED}"):
            unshard_sequence(x, TAKEN, group)
        return mha(x, layout=CUT)[0].shape

    assert refusals(attend) == [torch.Size([1, 6, 8])] * SIZE


def test_keys_of_another_layout_are_held_to_theirs():
    def attend(group):
        q = shards(group)
        keys = shard_sequence(torch.randn(1, 8, 2, 4), zigzag(8, SIZE), group.rank)
        attend = seqpar.RingAttention(group)
        attend(q, keys, keys.clone(), CUT, kv_layout=zigzag(8, SIZE))
        return attend(q, keys, keys, CUT, kv_layout=contiguous(8, SIZE))

    assert all("k was cut as" in said for said in refusals(attend))


@pytest.mark.parametrize("how", ["computed from", "written to", "another name", "along heads"])
def test_what_is_no_such_shard_any_more_is_taken(how):
    """Another name for the same spans is the same layout."""

    def attend(group):
        x, layout = shards(group), TAKEN
        if how == "computed from":
            x = x * 1.0
        if how == "written to":
            x.mul_(1.0)
        if how == "another name":
            layout = Layout("mine", CUT.length, CUT.size, CUT.spans)
        if how == "along heads":
            whole = torch.randn(1, LENGTH // SIZE, LENGTH, 4)
            x = shard_sequence(whole, CUT, group.rank, dim=2)
        return tuple(seqpar.RingAttention(group)(x, x, x, layout).shape)

    assert len(set(refusals(attend))) == 1
    assert isinstance(refusals(attend)[0], tuple)


def test_marks_do_no_harm():
    """Shards are copied, saved and loaded as other tensors are, and compiled code holds none."""
    x = shard_sequence(torch.randn(1, LENGTH, 4), CUT, 0)
    buffer = io.BytesIO()
    torch.save({"x": x}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["x"], x)
    assert torch.equal(copy.deepcopy(x), x)
    compiled = torch.compile(
        lambda t: shard_sequence(t, CUT, 0) + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(torch.ones(1, LENGTH)), torch.full((1, 6), 2.0))


HINTS = [
    ("ring", Mask(causal=True), contiguous, None, 33),
    ("ring", Mask(causal=True), zigzag, None, None),
    ("ring", Mask(), contiguous, None, None),
    ("ring", Mask(causal=True, window=3), contiguous, None, None),
    ("ulysses", Mask(causal=True), contiguous, None, None),
]


@pytest.mark.parametrize(("strategy", "mask", "layout", "invariant", "percent"), HINTS)
def test_a_causal_ring_out_of_balance_is_told_once(
    strategy, mask, layout, invariant, percent, caplog
):
    def attend(group):
        x = torch.randn(1, 6, 2, 4)
        plan = seqpar.Plan(
            group, layout(LENGTH, SIZE), mask, strategy=strategy, invariant=invariant
        )
        for _ in range(2):
            seqpar.attention(x, x, x, plan)

    with caplog.at_level(logging.INFO, announce.LOGGER.name):
        seqpar.simulate(SIZE, attend)
    (parts,) = (r.getMessage().split("; ") for r in caplog.records)
    want = (
        [] if percent is None else [f"a zigzag layout would take about {percent}% of its time off"]
    )
    assert parts[2:] == want
