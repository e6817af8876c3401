"""Padding and packing of a batch as documents: what is understood, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar import Mask
from seqpar.integrations.transformers import documents as of_batches
from seqpar.integrations.transformers.documents import Shown, documents_of, masked

ANY_SEEN = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4)


def mask_of(*rows):
    return torch.tensor([[int(c) for c in row] for row in rows])


@given(ANY_SEEN, st.booleans())
def test_what_is_seen_meets_what_is_seen_and_nothing_else(paddings, causal):
    """By brute force: rows that count see just the keys that count, whatever is hidden around them."""
    length = 9
    mask = torch.ones(len(paddings), length, dtype=torch.long)
    for row, (before, after) in enumerate(paddings):
        mask[row, :before] = 0
        mask[row, length - after :] = 0
    found = documents_of({"attention_mask": mask}, tuple(mask.shape), causal=causal)
    for row, bounds in enumerate(found):
        bounds = bounds or (0, length)
        document = torch.tensor([sum(b <= i for b in bounds) for i in range(length)])
        together = document[:, None] == document
        if causal:
            together &= torch.ones(length, length, dtype=torch.bool).tril()
        wanted = mask[row].bool().expand(length, -1)
        if causal:
            wanted = wanted & torch.ones(length, length, dtype=torch.bool).tril()
        counted = mask[row].bool()
        assert torch.equal(together[counted], wanted[counted])


def test_padding_at_the_end_needs_no_document_under_a_causal_mask():
    mask = mask_of("11100", "11111", "00000")
    assert documents_of({"attention_mask": mask}, (3, 5), causal=True) == [None] * 3
    assert documents_of({"attention_mask": mask}, (3, 5), causal=False) == [(0, 3, 5), None, None]


def test_positions_that_start_anew_are_documents():
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4], [7, 8, 9, 0, 0]])
    found = documents_of({"position_ids": positions}, (3, 5), causal=True)
    assert found == [(0, 2, 5), None, (0, 3, 4, 5)]
    packed = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 2, 5])}
    batch = packed | {"position_ids": positions[:1]}
    assert documents_of(batch, (1, 5), causal=False) == [(0, 2, 5)]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attention_mask": mask_of("1111111")},
        {"attention_mask": mask_of("1111100")},
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 0]])},
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3, 4]])},
        {"labels": torch.tensor([[1, 2, 3, 4, 5, -100, -100]])},
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_behind_cu_seq_lens_is_a_document_of_its_own(more, causal):
    """Whatever positions padding has, and whether an attention_mask hides it or says nothing of it."""
    packed = {"cu_seq_lens_q": torch.tensor([0, 2, 5]), "cu_seq_lens_k": torch.tensor([0, 2, 5])}
    assert documents_of(packed | more, (1, 7), causal=causal) == [(0, 2, 5, 7)]
    repeats = {"cu_seq_lens_q": torch.tensor([0, 2, 5, 5, 5])}
    assert documents_of(repeats | more, (1, 7), causal=causal) == [(0, 2, 5, 5, 5, 7)]


def test_rows_that_are_alike_have_one_mask():
    causal, packed = Mask(True), Mask(True, documents=(0, 3))
    assert masked(causal, (None, None), 3) == causal
    assert masked(causal, ((0, 3), None, (0, 3)), 3) == (packed, causal, packed)


def test_what_is_hidden_between_others_is_hidden_from_all():
    mask = mask_of("1011010", "0110000", "1111111")
    found = documents_of({"attention_mask": mask}, (3, 7), causal=False)
    assert found == [Shown(((0, 1), (2, 4), (5, 6))), (0, 1, 3, 7), None]
    first, *_ = masked(Mask(), tuple(found), 7)
    assert first.draw(7) == "\n".join(["x.xx.x."] * 7)
    assert masked(Mask(True), tuple(found), 7)[0].draw(3) == "x..\nx..\nx.x"


@pytest.mark.parametrize("moves", [True, False])
def test_chunks_begin_behind_padding_whatever_they_do_in_packed_texts(moves, monkeypatch):
    """Rows that begin at 2, whole and with a hole, in chunks of 3; a packed one as the release has it."""
    monkeypatch.setattr(of_batches, "chunks_begin_with_documents", lambda: moves)
    seen = {"attention_mask": mask_of("0011111", "0011011")}
    whole, holed = masked(Mask(True), tuple(documents_of(seen, (2, 7), causal=True)), 7, chunk=3)
    assert whole.documents == (0, 2, 5, 7)
    assert holed.draw(7) == "\n".join(
        [".......", ".......", "..x....", "..xx...", "..xx...", ".....x.", ".....xx"]
    )
    positions = {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3, 4]])}
    packed = masked(Mask(True), tuple(documents_of(positions, (1, 7), causal=True)), 7, chunk=3)
    assert packed.documents == ((0, 2, 5, 7) if moves else (0, 2, 3, 6, 7))


@pytest.mark.parametrize(
    ("batch", "causal", "error", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, False, NotImplementedError, r"got 4-D"),
        ({"attention_mask": {"full_attention": None}}, False, NotImplementedError, "got dict"),
        ({"attention_mask": mask_of("1111")}, True, ValueError, r"must be \(1, 5\)"),
        ({"attention_mask": mask_of("11122")}, True, ValueError, "zeros and ones"),
        (
            {"attention_mask": mask_of("11111"), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])},
            True, ValueError, r"start anew at \[2\], while attention_mask says one document",
        ),
        ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, False, NotImplementedError, "cu_seq_lens_q"),
        ({"position_ids": torch.tensor([[0, 1, 0]])}, True, ValueError, "position_ids must be"),
        ({"cu_seq_lens_q": [0, 2, 6]}, True, ValueError, r"go up from 0 to 5, or less .* got \(0, 2, 6\)"),
        ({"cu_seq_lens_q": [0, 3, 2]}, True, ValueError, "go up from 0 to 5"),
        ({"cu_seq_lens_q": [1, 5]}, True, ValueError, "go up from 0 to 5"),
        ({"cu_seq_lens_q": [0, 5], "cu_seq_lens_k": [0, 3, 5]}, True, ValueError, "must be the same"),
        (
            {"cu_seq_lens_q": [0, 5], "position_ids": torch.tensor([[0, 1, 0, 1, 2]])},
            True, ValueError, r"start anew at \[2\], where cu_seq_lens_q has no document",
        ),
        (
            {"cu_seq_lens_q": [0, 5], "attention_mask": mask_of("11110")},
            True, ValueError, "contradict",
        ),
        (
            {"cu_seq_lens_q": [0, 3], "attention_mask": mask_of("11011")},
            True, ValueError, "contradict",
        ),
        (
            {"cu_seq_lens_q": [0, 4], "position_ids": torch.tensor([[0, 1, 0, 1, 0]])},
            True, ValueError, r"start anew at \[2\], where cu_seq_lens_q has no document",
        ),
        (
            {"cu_seq_lens_q": [0, 4], "labels": torch.tensor([[1, 2, 3, 4, 5]])},
            True, ValueError, "ends at 4, so what follows is padding, and its labels must be -100",
        ),
    ],
)  # fmt: skip
def test_what_is_not_documents_is_refused(batch, causal, error, message):
    with pytest.raises(error, match=message):
        documents_of(batch, (1, 5), causal=causal)


def test_packed_batches_of_more_than_one_row_are_refused():
    with pytest.raises(ValueError, match="of a batch of 1"):
        documents_of({"cu_seq_lens_q": [0, 5]}, (2, 5), causal=True)
