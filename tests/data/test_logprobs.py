"""Losses that compare sequences, of log-probabilities of sharded tokens, are those of one device."""

import copy

import pytest
import torch
import torch.nn.functional as F

import seqpar
from seqpar.integrations.transformers import SequenceParallel
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import VOCABULARY

LENGTH, BETA = 17, 0.3


def pairs():
    """Two pairs of answers to prompts, padded on the left up to the answers and on the right behind them."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(1, VOCABULARY, (4, LENGTH), generator=generator)
    shown = torch.ones_like(ids)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for row, (start, prompt, end) in enumerate([(0, 5, 12), (3, 6, 17), (0, 5, 9), (3, 6, 16)]):
        shown[row, :start], shown[row, end:] = 0, 0
        answers[row, prompt:end] = True
    return ids, shown, answers


def preference(logprobs, answers):
    """DPO's loss without a reference, of the mean over an answer's tokens: answers have other lengths."""
    of_answers = (logprobs * answers).sum(1) / answers.sum(1)
    return -F.logsigmoid((of_answers[:2] - of_answers[2:]) / BETA).mean()


def clipped(logprobs, answers):
    """PPO's surrogate with an advantage for each token, of which some are beyond the clip."""
    generator = torch.Generator().manual_seed(5)
    old = logprobs.detach() + 0.3 * torch.randn(logprobs.shape, generator=generator).to(logprobs)
    advantages = torch.randn(logprobs.shape, generator=generator).to(logprobs)
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(gain * answers).sum() / answers.sum()


def on_one_device(loss_of, temperature=1.0):
    ids, shown, answers = pairs()
    model = FUSED["persimmon"].make()
    logits = model(input_ids=ids, attention_mask=shown).logits[:, :-1] / temperature
    logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    loss = loss_of(logprobs, answers[:, 1:])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}


def sharded(group, model, loss_of, gradients, kind, temperature):
    ids, shown, answers = pairs()
    model = copy.deepcopy(model)
    sp = SequenceParallel(model, seqpar.RingAttention(group))
    labels = ids.masked_fill(~answers, -100)
    inputs = sp.shard({"input_ids": ids, "attention_mask": shown, "labels": labels}, kind=kind)
    logprobs = seqpar.token_logprobs(
        model(**inputs).logits, inputs.labels, inputs.layout, group,
        temperature=temperature, gradients=gradients,
    )  # fmt: skip
    assert not logprobs[:, :-1][~answers[:, 1:]].any()
    loss = loss_of(logprobs[:, :-1], answers[:, 1:])
    loss.backward()
    seqpar.sum_gradients(model.parameters(), group)
    share = 1 if gradients == "sum" else group.size
    return loss.detach(), {n: p.grad / share for n, p in model.named_parameters()}


@pytest.mark.parametrize("loss_of", [preference, clipped])
@pytest.mark.parametrize(
    ("size", "gradients", "kind", "temperature"),
    [
        (1, "sum", None, 1.0), (2, "sum", "striped", 0.7), (3, "mean", None, 1.0),
        (4, "sum", "contiguous", 1.0),
    ],
)  # fmt: skip
def test_losses_of_sequences_equal_one_device(loss_of, size, gradients, kind, temperature):
    want, of_weights = on_one_device(loss_of, temperature)
    model = FUSED["persimmon"].make()
    for got, found in seqpar.simulate(size, sharded, model, loss_of, gradients, kind, temperature):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        for name, gradient in of_weights.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-11)


def called_with(group, change):
    layout = seqpar.zigzag(8, group.size)
    rows = layout.rows[group.rank]
    given = {"logits": torch.zeros(1, rows, 5), "labels": torch.zeros(1, rows, dtype=torch.long)}
    options = {"temperature": 1.0, "gradients": "sum"}
    changed = change(group.rank, rows)
    given |= {n: x for n, x in changed.items() if n in given}
    options |= {n: x for n, x in changed.items() if n in options}
    with pytest.raises((ValueError, seqpar.DesyncError)) as caught:
        seqpar.token_logprobs(*given.values(), layout, group, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rank, rows: {"labels": torch.full((1, rows), 5 * rank)}, "labels must be 0 ... 4 or -100"),
        (lambda rank, rows: {"labels": torch.zeros(1, rows + rank, dtype=torch.long)}, "labels must be"),
        (lambda rank, _: {"temperature": 1.0 + rank}, "temperature"),
        (lambda *_: {"temperature": 0.0}, "temperature must be positive"),
        (lambda *_: {"gradients": "max"}, "gradients must be one of"),
    ],
)  # fmt: skip
def test_what_one_rank_would_refuse_all_refuse(change, message):
    assert all(message in text for text in seqpar.simulate(2, called_with, change))
