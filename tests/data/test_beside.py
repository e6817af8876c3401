"""Tensors beside labels: sharded with the rows, or with the tokens that the rows predict."""

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


def batch_of(length):
    """Tensors of several types and shapes, in which nothing is 0."""
    ids = torch.arange(1, 1 + 2 * length).view(2, length)
    beside = {
        "advantages": ids / 8,
        "loss_mask": torch.ones(2, length, dtype=torch.bool),
        "experts": ids[..., None] * torch.tensor([1, -1]),
    }
    return {"input_ids": ids, "labels": ids} | beside, list(beside)


@given(LENGTHS, st.integers(1, 4), KINDS, st.booleans(), st.booleans(), st.booleans())
def test_rows_have_their_own_entries_or_those_of_the_tokens_they_predict(
    lengths, size, kind, shifts, packs, pads
):
    bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
    length = bounds[-1]
    end = -(-length // 8) * 8 if pads else length
    mask = seqpar.Mask(causal=True, documents=seqpar.padded_documents(bounds, end))
    batch, names = batch_of(length)
    options = {"mask": mask, "labels": "next_in_document" if packs else "next"}
    options |= {"pad_to_multiple_of": 8, "pad_token_id": 0} if pads else {}
    options["shifted" if shifts else "sequences"] = names

    def fn(group):
        shard, layout = seqpar.shard_batch(batch, group, kind, **options)
        return {n: seqpar.unshard_sequence(shard[n], layout, group) for n in names}

    last = {b - 1 for b in bounds[1:]} if packs else {length - 1}
    for found in simulate(size, fn):
        for name in names:
            x = batch[name]
            assert found[name].dtype == x.dtype
            assert found[name].shape == (2, end, *x.shape[2:])
            for i, row in enumerate(found[name].unbind(1)):
                if i >= length or (shifts and i in last):
                    assert not row.any(), "nothing is there"
                else:
                    assert torch.equal(row, x[:, i + shifts])


def test_names_may_be_given_in_any_order_and_once():
    batch, _ = batch_of(6)

    def fn(group):
        names = ["advantages", "experts"]
        names = names if group.rank else iter(names[::-1])
        shard, layout = seqpar.shard_batch(batch, group, sequences=names, shifted={"loss_mask"})
        return seqpar.unshard_sequence(shard["loss_mask"], layout, group)[0].tolist()

    assert simulate(2, fn) == [[True] * 5 + [False]] * 2


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {}, ValueError, r"is \['logprobs'\] a sequence\? Name it in sequences= .* shifted= .* whole="),
        ({}, {"sequences": ["logprobs"], "whole": ["logprobs"]}, ValueError, r"\['logprobs'\] must be named"),
        ({}, {"shifted": ["logprobs"], "whole": ["logprobs"]}, ValueError, r"\['logprobs'\] must be named"),
        ({}, {"shifted": ["logprobs"], "sequences": ["logprobs"]}, ValueError, "must be named once"),
        ({}, {"sequences": ["logprobs", "labels"]}, ValueError, r"\['labels'\] must be named once"),
        ({}, {"sequences": ["logprobs", "values"]}, ValueError, r"must have \['values'\]"),
        ({"logprobs": None}, {"shifted": ["logprobs"]}, ValueError, r"must have \['logprobs'\]"),
        ({"logprobs": torch.ones(2, 5)}, {"sequences": ["logprobs"]}, ValueError, r"\(2, 5\).*in whole="),
        ({"logprobs": torch.ones(2)}, {"shifted": ["logprobs"]}, ValueError, r"\(2,\).*goes in whole="),
        ({"logprobs": [[0.5] * 6] * 2}, {"sequences": ["logprobs"]}, TypeError, "'logprobs': 'list'"),
        ({}, {"shifted": ["logprobs"], "labels": "own"}, ValueError, "name tensors in sequences="),
    ],
)  # fmt: skip
def test_names_that_say_no_sequence_are_refused_on_all_ranks(change, options, error, message):
    ids = torch.ones(2, 6)
    good = {"input_ids": ids, "labels": ids, "logprobs": torch.ones(2, 6)}

    def fn(group):
        with pytest.raises(error, match=message):
            seqpar.shard_batch(good | change, group, **options)
        mine, batch = (
            (options, good | change) if group.rank == 1 else ({"sequences": ["logprobs"]}, good)
        )
        with pytest.raises((error, DesyncError), match=message):
            seqpar.shard_batch(batch, group, **mine)
        return True

    assert simulate(3, fn) == [True] * 3


def test_a_rank_that_shifts_what_others_do_not_is_told_on_every_rank():
    batch, names = batch_of(6)

    def fn(group):
        options = [{"sequences": names}, {"sequences": names[1:], "shifted": names[:1]}]
        with pytest.raises(DesyncError, match=r"sequences is .* on ranks 0, 1.*shifted is \[\] on"):
            seqpar.shard_batch(batch, group, **options[group.rank // 2])
        return True

    assert simulate(3, fn) == [True] * 3


def test_integers_beside_are_compared():
    batch, names = batch_of(6)

    def fn(group):
        other = batch | {"experts": batch["experts"] + group.rank}
        with pytest.raises(DesyncError, match=r"batch\['experts'\]"):
            seqpar.shard_batch(other, group, sequences=names)
        return True

    assert simulate(2, fn) == [True] * 2


def policy_loss(logits, labels, old, advantages, counted):
    """The clipped objective of PPO, for each row; nothing where it does not count."""
    new = -F.cross_entropy(logits.mT, labels.clamp(min=0), reduction="none")
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -gain.masked_fill(~counted, 0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_policy_step_equals_one_device(size):
    """Advantages and the loss mask belong to tokens; old log-probabilities, to the rows that predict."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 9, dtype=torch.float64, generator=generator)
    ids = torch.randint(9, (2, 11), generator=generator)
    advantages = torch.randn(2, 11, dtype=torch.float64, generator=generator)
    counted = torch.rand(2, 11, generator=generator) < 0.6
    old = torch.log_softmax(weight[ids] + 0.3, -1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    old = old + torch.randn(old.shape, dtype=torch.float64, generator=generator) / 4

    whole = weight.clone().requires_grad_()
    rows = policy_loss(whole[ids][:, :-1], ids[:, 1:], old, advantages[:, 1:], counted[:, 1:])
    want = rows.sum() / counted[:, 1:].sum()
    want.backward()

    def fn(group):
        mine = weight.clone().requires_grad_()
        batch, _ = seqpar.shard_batch(
            {
                "input_ids": ids,
                "labels": ids,
                "old": F.pad(old, (0, 1)),
                "advantages": advantages,
                "counted": counted,
            },
            group,
            sequences=["old"],
            shifted=["advantages", "counted"],
        )
        logits = mine[batch["input_ids"]]
        beside = [batch[name] for name in ("labels", "old", "advantages", "counted")]
        loss = seqpar.mean_loss(policy_loss(logits, *beside), group, valid=batch["counted"])
        loss.backward()
        seqpar.sum_gradients([mine], group)
        return loss.detach(), mine.grad

    for loss, gradient in simulate(size, fn):
        torch.testing.assert_close(loss, want.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-11, atol=1e-11)
