"""Several tokens ahead: labels and inputs of multi-token prediction, which trains as on one device."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import seqpar
from seqpar import DesyncError, simulate
from seqpar.layout import LAYOUTS

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)
KINDS = st.sampled_from([*LAYOUTS, "balanced"])


def bounds_of(lengths):
    return (0, *torch.tensor(lengths).cumsum(0).tolist())


def further(rows, bounds, by, fill):
    """Token by token: what stands `by` places further on in the same document."""
    found = [[fill] * bounds[-1] for _ in rows]
    for n, row in enumerate(rows):
        for start, end in zip(bounds, bounds[1:], strict=False):
            for i in range(start, end - by):
                found[n][i] = row[i + by]
    return found


@given(LENGTHS, st.integers(1, 4), st.integers(1, 9), KINDS, st.booleans(), st.booleans())
def test_tokens_ahead_are_those_of_the_whole_sequence(lengths, size, num, kind, packs, pads):
    """Documents shorter than the distance, ranks without rows and labels that do not count included."""
    bounds = bounds_of(lengths)
    length = bounds[-1]
    end = -(-length // 8) * 8 if pads else length
    ids = torch.arange(1, 1 + 2 * length).view(2, length)
    labels = torch.where(ids % 5 == 0, -100, ids)
    options = {"pad_to_multiple_of": 8, "pad_token_id": 99} if pads else {}
    mask = seqpar.Mask(causal=True, documents=seqpar.padded_documents(bounds, end))
    options |= {"mask": mask, "labels": "next_in_document" if packs else "next"}

    def fn(group):
        batch = {"input_ids": ids, "labels": labels}
        shard, layout = seqpar.shard_batch(batch, group, kind, labels_ahead=num, **options)
        assert shard["labels_ahead"].is_contiguous()
        names = ("labels_ahead", "input_ids_ahead")
        return [seqpar.unshard_sequence(shard[n], layout, group, dim=2).tolist() for n in names]

    padded_ids = F.pad(ids, (0, end - length), value=99).tolist()
    padded_labels = F.pad(labels, (0, end - length), value=-100).tolist()
    documents = mask.documents if packs else (0, end)
    want_labels = [further(padded_labels, documents, by, -100) for by in range(2, num + 1)]
    want_ids = [further(padded_ids, documents, by, 0) for by in range(1, num)]
    for got_labels, got_ids in simulate(size, fn):
        assert got_labels == want_labels
        assert got_ids == want_ids
    assert ids[0, 0] == 1, "the batch is not written to"


def test_labels_of_the_next_token_stay_as_they_are():
    batch = {"input_ids": torch.arange(7)[None], "labels": torch.arange(7)[None]}

    def fn(group):
        plain, _ = seqpar.shard_batch(batch, group)
        assert not any("ahead" in name for name in plain)
        for num, count in ((1, 0), (3, 2)):
            more, _ = seqpar.shard_batch(batch, group, labels_ahead=num)
            assert more["labels_ahead"].shape == (count, *more["labels"].shape)
            assert more["input_ids_ahead"].shape == (count, *more["labels"].shape)
            assert all(torch.equal(more[name], plain[name]) for name in plain)

    simulate(2, fn)


def test_embeddings_ahead_have_gradients():
    """A batch of embeddings has no ids; what has no token ahead is 0."""
    embeds = torch.randn(2, 5, 3, dtype=torch.float64)
    labels = torch.zeros(2, 5, dtype=torch.long)
    weights = torch.randn(2, 2, 5, 3, dtype=torch.float64)

    def fn(group):
        leaf = embeds.clone().requires_grad_()
        batch = {"inputs_embeds": leaf, "labels": labels}
        shard, layout = seqpar.shard_batch(batch, group, labels_ahead=3)
        assert "input_ids_ahead" not in shard
        ahead = shard["inputs_embeds_ahead"]
        here = seqpar.shard_sequence(weights, layout, group.rank, dim=2)
        (gradient,) = torch.autograd.grad((ahead * here).sum(), leaf)
        return seqpar.unshard_sequence(ahead, layout, group, dim=2), gradient

    (ahead, _), *_ = results = simulate(3, fn)
    zeros = torch.zeros(2, 2, 3, dtype=torch.float64)
    assert torch.equal(ahead[0], torch.cat([embeds[:, 1:], zeros[:, :1]], 1))
    assert torch.equal(ahead[1], torch.cat([embeds[:, 2:], zeros], 1))
    want = torch.zeros_like(embeds)
    want[:, 1:] += weights[0, :, :-1]
    want[:, 2:] += weights[1, :, :-2]
    torch.testing.assert_close(sum(gradient for _, gradient in results), want)


def test_sequences_packed_apart_have_documents_of_their_own():
    ids = torch.arange(1, 11).view(2, 5)
    masks = [seqpar.Mask(causal=True, documents=b) for b in ((0, 2, 5), (0, 4, 5))]
    options = {"mask": masks, "labels": "next_in_document", "labels_ahead": 2}

    def fn(group):
        batch = {"input_ids": ids, "labels": ids}
        shard, layout = seqpar.shard_batch(batch, group, "balanced", **options)
        names = (("labels", 1), ("labels_ahead", 2), ("input_ids_ahead", 2))
        return [seqpar.unshard_sequence(shard[n], layout, group, dim=d).tolist() for n, d in names]

    for labels, (ahead,), (taken,) in simulate(2, fn):
        assert labels == [[2, -100, 4, 5, -100], [7, 8, 9, -100, -100]]
        assert ahead == [[-100, -100, 5, -100, -100], [8, 9, -100, -100, -100]]
        assert taken == [[2, 0, 4, 5, 0], [7, 8, 9, 0, 0]]


def test_masks_of_other_sequences_are_refused():
    masks = [seqpar.Mask(documents=(0, 4))] * 3

    def fn(group):
        batch = {"labels": torch.ones(2, 4)}
        seqpar.shard_batch(batch, group, mask=masks, labels="next_in_document")

    with pytest.raises(ValueError, match="2 sequences need as many masks, or one, got 3"):
        simulate(2, fn)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"labels_ahead": 0}, "labels_ahead must be a positive integer, got 0"),
        ({}, {"labels_ahead": 2.0}, "labels_ahead must be a positive integer, got 2.0"),
        ({}, {"labels_ahead": True}, "labels_ahead must be a positive integer, got True"),
        ({}, {"labels_ahead": 2, "labels": "own"}, "labels='own' a row predicts its own token"),
        ({"labels": None}, {"labels_ahead": 2}, "needs labels in the batch"),
        ({}, {"labels_ahead": 2, "whole": ["labels"]}, "needs labels in the batch"),
        ({"labels_ahead": 3}, {"labels_ahead": 2}, r"has \['labels_ahead'\] already"),
        ({}, {"labels_ahead": 2, "labels": "next_in_document"}, "asks for the documents"),
    ],
)
def test_what_has_no_labels_ahead_is_refused_on_all_ranks(change, options, message):
    batch = {"input_ids": torch.ones(1, 6), "labels": torch.ones(1, 6)} | change

    def fn(group):
        with pytest.raises(ValueError, match=message):
            seqpar.shard_batch(batch, group, **options)
        mine = options if group.rank == 0 else {}
        with pytest.raises((ValueError, DesyncError), match=message):
            seqpar.shard_batch(batch, group, **mine)
        return True

    assert simulate(3, fn) == [True] * 3


def test_a_rank_that_looks_further_ahead_is_told_on_every_rank():
    batch = {"input_ids": torch.ones(1, 6), "labels": torch.ones(1, 6)}

    def fn(group):
        with pytest.raises(DesyncError, match="labels_ahead is 2 on ranks 0, 1, 3 on rank 2"):
            seqpar.shard_batch(batch, group, labels_ahead=2 + group.rank // 2)
        return True

    assert simulate(3, fn) == [True] * 3


# A trunk with a head for the next token, and blocks of multi-token prediction: block n joins what came
# out of the one before it with the token n ahead, attends, and predicts the token n + 1 ahead.
VOCABULARY, WIDTH, HEADS, BLOCKS = 23, 16, 4, 2
DOCUMENTS = (0, 5, 6, 8, 19)
IDS = torch.randint(VOCABULARY, (1, 19), generator=torch.Generator().manual_seed(3))


def weights():
    generator = torch.Generator().manual_seed(4)
    shapes = {"tokens": (VOCABULARY, WIDTH), "head": (WIDTH, VOCABULARY)}
    for n in range(BLOCKS + 1):
        shapes |= {f"{x}{n}": (WIDTH, WIDTH) for x in "qkv"}
        shapes[f"join{n}"] = (2 * WIDTH, WIDTH)
    del shapes["join0"]
    drawn = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {n: (x / 4).requires_grad_() for n, x in drawn.items()}


def logits_of(w, ids, ids_ahead, attend):
    """Of the trunk, and of each block."""

    def layer(x, n):
        return x + attend(*((x @ w[f"{p}{n}"]).unflatten(-1, (HEADS, -1)) for p in "qkv")).flatten(
            2
        )

    x = layer(w["tokens"][ids], 0)
    found = [x @ w["head"]]
    for n, taken in enumerate(ids_ahead, 1):
        x = layer(torch.cat([x, w["tokens"][taken]], -1) @ w[f"join{n}"], n)
        found.append(x @ w["head"])
    return found


def on_one_device():
    """Loss and gradients, document by document, so that nothing can cross a border."""
    w, sums = weights(), [0.0] * (BLOCKS + 1)
    counts = [0] * (BLOCKS + 1)
    for start, end in zip(DOCUMENTS, DOCUMENTS[1:], strict=False):
        ids, length = IDS[:, start:end], end - start

        def attend(q, k, v):
            rows = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)

        ahead = [F.pad(ids[:, n:], (0, min(n, length))) for n in range(1, BLOCKS + 1)]
        for n, logits in enumerate(logits_of(w, ids, ahead, attend)):
            there = max(length - n - 1, 0)
            counts[n] += there
            targets = ids[0, n + 1 :]
            sums[n] = sums[n] + F.cross_entropy(logits[0, :there], targets, reduction="sum")
    loss = sums[0] / counts[0]
    for total, count in zip(sums[1:], counts[1:], strict=True):
        loss = loss + 0.3 / BLOCKS * total / count
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in w.items()}


def multi_token_step(group, kind):
    w, mask = weights(), seqpar.Mask(causal=True, documents=DOCUMENTS)
    batch, layout = seqpar.shard_batch(
        {"input_ids": IDS, "labels": IDS},
        group,
        kind,
        mask=mask,
        labels="next_in_document",
        labels_ahead=1 + BLOCKS,
    )
    attend = seqpar.RingAttention(group, mask=mask)
    found = logits_of(
        w, batch["input_ids"], batch["input_ids_ahead"], lambda q, k, v: attend(q, k, v, layout)
    )
    loss = 0.0
    for n, (logits, labels) in enumerate(
        zip(found, (batch["labels"], *batch["labels_ahead"]), strict=True)
    ):
        losses = F.cross_entropy(logits.mT, labels, reduction="none")
        mean = seqpar.mean_loss(losses, group, valid=labels != -100)
        loss = loss + mean * (0.3 / BLOCKS if n else 1.0)
    loss.backward()
    seqpar.sum_gradients(w.values(), group)
    return loss.detach(), {name: x.grad for name, x in w.items()}


def check_step(results):
    want_loss, want = on_one_device()
    for loss, gradients in results:
        torch.testing.assert_close(loss, want_loss, rtol=1e-11, atol=1e-11)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, want[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", [*LAYOUTS, "balanced"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_multi_token_prediction_over_packed_documents_equals_one_device(size, kind):
    check_step(simulate(size, multi_token_step, kind))


def test_multi_token_prediction_over_processes(worlds):
    check_step(worlds.run(3, multi_token_step, "balanced"))
