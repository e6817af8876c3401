"""Padded and packed batches on sharded sequences equal transformers on one device with its own masks."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

import seqpar
from seqpar.testing.models.tiny import FAMILIES, batch_of
from seqpar.testing.models.training_step import differences, on_rank, one_device

LENGTH = 23


def check(name, batch, want_batch=None, sizes=(3,), strategies=("ring", "ulysses"), **options):
    """Sharded with `batch`, on one device with `want_batch`."""
    family = FAMILIES[name]
    model = family.make()
    want = one_device(model, want_batch or batch, family.labels)
    mask = batch.get("attention_mask")
    for size in sizes:
        for strategy in strategies:
            for got in seqpar.simulate(
                size, lambda g, s=strategy: on_rank(g, model, batch, s, **options)
            ):
                counted = None if mask is None else mask.bool()
                found = differences(got, want, family.float32, counted)
                assert max(found["logits"], found["loss"], found["gradients"]) < 1e-10, found
                assert found["float32"] < 1e-6


def padded(*seen):
    """A batch of which row i counts from the first to before the second of `seen[i]`."""
    batch = batch_of(len(seen), LENGTH)
    mask = torch.zeros(len(seen), LENGTH, dtype=torch.long)
    for row, (start, stop) in enumerate(seen):
        mask[row, start:stop] = 1
        batch["labels"][row, :start] = -100
        batch["labels"][row, stop:] = -100
    return batch | {"attention_mask": mask}


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_encoders_do_not_see_padding(name):
    """Lengths that differ by row, two that are equal, and padding on both sides."""
    check(name, padded((0, LENGTH), (0, 11), (0, 11), (4, LENGTH), (3, 17)))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_decoders_take_padding_on_the_right(name):
    check(name, padded((0, LENGTH), (0, 9), (0, 2)), strategies=["ring"])


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "llama4"])
def test_decoders_take_padding_on_the_left(name):
    batch = padded((0, LENGTH), (8, LENGTH), (5, 20))
    batch["labels"][1, 8] = batch["labels"][2, 5] = -100  # would be predicted by padding
    check(name, batch)


def test_left_padding_with_positions_that_start_at_the_text():
    batch = padded((0, LENGTH), (8, LENGTH))
    batch["labels"][1, 8] = -100
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    check("qwen3", batch | {"position_ids": positions}, strategies=["ring"])


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "llama4"])
def test_what_is_hidden_between_others_is_hidden_from_all(name):
    """Holes that differ by row, one beside padding at the end; positions are those of the row."""
    batch = padded((0, LENGTH), (0, LENGTH), (0, 19))
    for row, hole in ((1, slice(6, 9)), (1, slice(15, 16)), (2, slice(3, 11))):
        batch["attention_mask"][row, hole] = 0
        batch["labels"][row, hole.start : hole.stop + 1] = -100
    check(name, batch)


def test_labels_of_hidden_tokens_are_refused_on_all_ranks():
    batch = padded((0, LENGTH), (8, LENGTH))
    with pytest.raises(ValueError, match="in row 1, token 8 is predicted by token 7, which"):
        seqpar.simulate(2, on_rank, FAMILIES["llama"].make(), batch)
    batch["labels"][0, -1] = batch["labels"][1, 2] = 5
    with pytest.raises(ValueError, match="in row 1, token 2, which attention_mask hides"):
        seqpar.simulate(2, on_rank, FAMILIES["bert"].make(), batch)


def flattened(**options):
    """What the collator of transformers makes of four texts, one of them a single token."""
    ids = batch_of(1, LENGTH)["input_ids"][0].tolist()
    texts = [{"input_ids": ids[a:b]} for a, b in ((0, 9), (9, 10), (10, 17), (17, LENGTH))]
    return dict(DataCollatorWithFlattening(**options)(texts, return_tensors="pt"))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4"])
def test_packed_texts_equal_one_device(name):
    """On one device transformers finds the texts by the same position_ids."""
    check(name, flattened())


def test_packed_texts_equal_one_device_in_a_balanced_layout():
    check("mistral", flattened(), strategies=["ring"], sizes=(4,), kind="balanced")


def test_cu_seq_lens_say_the_same_as_positions():
    batch = flattened(return_flash_attn_kwargs=True)
    assert "cu_seq_lens_q" in batch
    check("llama", batch, flattened(), strategies=["ring"])


@pytest.mark.parametrize("name", ["llama", "mistral", "llama4"])
@pytest.mark.parametrize("hides", [True, False])
def test_packed_texts_that_end_before_the_row_does_equal_one_device(name, hides):
    """Padding of 5 tokens that cu_seq_lens leaves out; one device finds it by positions that start anew."""
    batch = flattened(return_flash_attn_kwargs=True)
    after = {"input_ids": 7, "labels": -100, "position_ids": torch.arange(5)[None]}
    for key, fill in after.items():
        rest = fill if torch.is_tensor(fill) else torch.full((1, 5), fill)
        batch[key] = torch.cat([batch[key], rest], 1)
    want = {key: batch[key] for key in after}
    if hides:
        batch["attention_mask"] = (torch.arange(LENGTH + 5) < LENGTH).long()[None]
    check(name, batch, want)


def test_encoders_take_packed_texts_by_cu_seq_lens():
    """On one device as a batch of padded texts."""
    family = FAMILIES["modernbert"]
    batch, bounds = batch_of(1, LENGTH), (0, 9, 10, 17, LENGTH)
    starts = torch.cat([torch.arange(b - a) for a, b in zip(bounds[:-1], bounds[1:], strict=True)])
    cu = torch.tensor(bounds)
    packed = batch | {"position_ids": starts[None], "cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    rows = [range(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    apart = {
        name: torch.nn.utils.rnn.pad_sequence([x[0, list(r)] for r in rows], True, fill)
        for name, x, fill in (
            ("input_ids", batch["input_ids"], 0),
            ("labels", batch["labels"], -100),
            ("attention_mask", torch.ones_like(batch["input_ids"]), 0),
        )
    }
    model = family.make()
    want = one_device(model, apart, family.labels)
    for got in seqpar.simulate(3, on_rank, model, packed):
        logits = torch.cat([want.logits[i, : len(r)] for i, r in enumerate(rows)])
        torch.testing.assert_close(got.logits[0], logits, rtol=1e-10, atol=1e-10)
        found = differences(got, type(want)(got.logits, want.loss, want.gradients))
        assert max(found.values()) < 1e-10, found


def test_rows_packed_apart_equal_one_device():
    """Three packings in four rows, of which the first and the last are packed alike."""
    batch = batch_of(4, LENGTH)
    starts = [[0, 5, 12], [0], [0, 9], [0, 5, 12]]
    positions = torch.stack(
        [torch.cat([torch.arange(b - a) for a, b in zip(s, [*s[1:], LENGTH], strict=True)]) for s in starts]
    )  # fmt: skip
    check("qwen3", batch | {"position_ids": positions})


def over_processes(group):
    family = FAMILIES["bert"]
    return on_rank(group, family.make(), padded((0, LENGTH), (0, 11), (4, LENGTH)))


def test_padding_over_processes(worlds):
    family, batch = FAMILIES["bert"], padded((0, LENGTH), (0, 11), (4, LENGTH))
    want = one_device(family.make(), batch, family.labels)
    for got in worlds.run(2, over_processes):
        found = differences(got, want, counted=batch["attention_mask"].bool())
        assert max(found.values()) < 1e-10, found


def test_models_that_count_positions_from_their_padding_equal_one_device():
    """RoBERTa counts from 1 after its pad_token_id, over what is not padding."""
    from dataclasses import replace

    family = replace(
        FAMILIES["bert"],
        model="RobertaForMaskedLM",
        config="RobertaConfig",
        options=FAMILIES["bert"].options | {"pad_token_id": 1},
    )
    model, batch = family.make(), padded((0, LENGTH), (0, 11))
    batch["input_ids"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], 1)
    want = one_device(model, batch, family.labels)
    for got in seqpar.simulate(2, on_rank, model, batch):
        found = differences(got, want, counted=batch["attention_mask"].bool())
        assert max(found.values()) < 1e-10, found
    left = padded((0, LENGTH), (4, LENGTH))
    with pytest.raises(
        NotImplementedError, match="counts positions from 2 over what is not padding"
    ):
        seqpar.simulate(2, on_rank, model, left)
