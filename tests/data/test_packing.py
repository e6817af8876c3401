"""Packed documents: boundaries from restarting positions, and labels at the borders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seqpar
from seqpar import simulate

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def packed(lengths):
    """(position_ids [1 s], boundaries)."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return positions, (0, *torch.tensor(lengths).cumsum(0).tolist())


@given(LENGTHS)
def test_documents_begin_where_positions_restart(lengths):
    positions, bounds = packed(lengths)
    assert seqpar.packed_documents(positions) == bounds
    assert seqpar.packed_documents(positions.expand(3, -1)) == bounds
    assert seqpar.packed_documents(positions[0] + 5) == bounds
    assert seqpar.Mask(documents=seqpar.packed_documents(positions)).documents == bounds


def test_what_is_not_packed_and_what_is_padding():
    assert seqpar.packed_documents(torch.arange(5)) == (0, 5)
    assert seqpar.packed_documents(torch.empty(1, 0, dtype=torch.long)) == (0,)
    assert seqpar.packed_documents(torch.tensor([0, 1, 2, 0, 0])) == (0, 3, 4, 5)


def test_documents_that_no_mask_can_tell_apart_are_refused():
    with pytest.raises(ValueError, match="must have the same documents"):
        seqpar.packed_documents(torch.tensor([[0, 1, 2, 0], [0, 1, 0, 1]]))
    with pytest.raises(TypeError, match="integers"):
        seqpar.packed_documents(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\[\.\. s\]"):
        seqpar.packed_documents(torch.tensor(3))


@given(LENGTHS, st.integers(1, 4), st.booleans())
def test_the_last_row_of_a_document_has_no_label_if_asked(lengths, size, pads):
    _, bounds = packed(lengths)
    ids = torch.arange(10, 10 + bounds[-1])[None]
    end = -(-bounds[-1] // 8) * 8 if pads else bounds[-1]
    mask = seqpar.Mask(causal=True, documents=(*bounds, end))
    options = {"pad_to_multiple_of": 8, "pad_token_id": 0} if pads else {}

    def fn(group, labels):
        batch = {"input_ids": ids, "labels": ids}
        shard, layout = seqpar.shard_batch(batch, group, mask=mask, labels=labels, **options)
        return seqpar.unshard_sequence(shard["labels"], layout, group)[0]

    (crossing, *_), (within, *_) = (simulate(size, fn, n) for n in ("next", "next_in_document"))
    last = torch.tensor(bounds[1:]) - 1
    following = torch.full((end,), -100)
    following[: bounds[-1] - 1] = ids[0, 1:]
    assert torch.equal(crossing, following)
    following[last] = -100
    assert torch.equal(within, following)
    assert torch.equal(ids[0], torch.arange(10, 10 + bounds[-1])), "the batch is not written to"


def test_labels_within_documents_need_documents_that_fit():
    def raises(match, mask):
        batch = {"input_ids": torch.ones(1, 6), "labels": torch.ones(1, 6)}
        with pytest.raises(ValueError, match=match):
            simulate(
                2,
                lambda g: seqpar.shard_batch(batch, g, mask=mask, labels="next_in_document"),
            )

    raises("asks for the documents", None)
    raises("asks for the documents", seqpar.Mask(causal=True))
    raises("end where the sequence does, at 6.*padded_documents", seqpar.Mask(documents=(0, 4)))


def test_attention_to_packed_documents_is_that_of_each_alone():
    positions, bounds = packed([3, 5, 1, 2])
    q, k, v = torch.randn(3, 1, 11, 2, 4, dtype=torch.float64)
    mask = seqpar.Mask(causal=True, documents=seqpar.packed_documents(positions))

    def fn(group):
        layout = seqpar.zigzag(11, group.size)
        mine = (seqpar.shard_sequence(x, layout, group.rank) for x in (q, k, v))
        out = seqpar.RingAttention(group, mask=mask)(*mine, layout)
        return seqpar.unshard_sequence(out, layout, group)

    whole = simulate(3, fn)[0]
    for a, b in zip(bounds, bounds[1:], strict=False):
        one = [x[:, a:b].transpose(1, 2) for x in (q, k, v)]
        alone = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)
        torch.testing.assert_close(whole[:, a:b], alone.transpose(1, 2), rtol=1e-11, atol=1e-11)


@given(LENGTHS, st.integers(0, 5), st.integers(0, 3))
def test_what_is_behind_the_last_document_is_one_of_its_own(lengths, behind, repeats):
    _, bounds = packed(lengths)
    length = bounds[-1] + behind
    want = (*bounds, length) if behind else bounds
    assert seqpar.padded_documents(bounds, length) == want
    assert seqpar.padded_documents(torch.tensor(bounds, dtype=torch.int32), length) == want
    repeated = seqpar.padded_documents([*bounds, *[bounds[-1]] * repeats], length)
    assert tuple(sorted(set(repeated))) == want
    seen = seqpar.Mask(causal=True, documents=repeated).draw(length).splitlines()
    assert all("x" not in row[bounds[-1] :] for row in seen[: bounds[-1]])
    assert all("x" not in row[: bounds[-1]] for row in seen[bounds[-1] :])


def test_a_row_that_is_all_padding_is_one_document():
    assert seqpar.padded_documents([0], 4) == (0, 4)
    assert seqpar.padded_documents([0], 0) == (0,)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 3, 6], ValueError, r"from 0 to at most 5, got \(0, 3, 6\)"),
        ([1, 3], ValueError, "boundaries from 0"),
        ([0, 3, 2], ValueError, "documents"),
        ([], ValueError, "documents"),
        ([0.0, 2.5], TypeError, "documents"),
        (([0, 1], [0, 2]), ValueError, "at most 5"),
    ],
)
def test_bounds_that_do_not_fit_the_row_are_refused(cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        seqpar.padded_documents(cu_seqlens, 5)


def test_attention_beside_padding_is_that_of_the_documents_alone():
    """With cu_seqlens that end before the padded row does, in every layout."""
    bounds, length = (0, 3, 8, 9), 16
    q, k, v = torch.randn(3, 1, length, 2, 4, dtype=torch.float64)
    mask = seqpar.Mask(causal=True, documents=seqpar.padded_documents(bounds, length))

    def fn(group, kind):
        batch = {"input_ids": torch.ones(1, 9)}
        options = {"pad_to_multiple_of": 8, "pad_token_id": 0, "mask": mask}
        _, layout = seqpar.shard_batch(batch, group, kind, labels="next_in_document", **options)
        mine = (seqpar.shard_sequence(x, layout, group.rank) for x in (q, k, v))
        out = seqpar.RingAttention(group, mask=mask)(*mine, layout)
        return seqpar.unshard_sequence(out, layout, group)

    for kind in ("zigzag", "striped", "contiguous", "balanced"):
        whole = simulate(3, fn, kind)[0]
        for a, b in zip(bounds, bounds[1:], strict=False):
            one = [x[:, a:b].transpose(1, 2) for x in (q, k, v)]
            alone = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True)
            torch.testing.assert_close(whole[:, a:b], alone.transpose(1, 2), rtol=1e-11, atol=1e-11)
