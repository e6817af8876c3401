"""Calls of models whose attention was replaced: checkpointed, padded, packed, dropped from."""

import copy

import pytest
import torch

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.testing.models.fused import FUSED, exactly, replaced_step, whole_gradients
from seqpar.testing.models.tiny import batch_of
from seqpar.testing.models.training_step import differences, gradients_of, one_device

# Of the names that transformers had before 5.23, which serve with it too.
pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
EXACT = {"rtol": 1e-11, "atol": 1e-11}
LENGTH = 13
SILENT = ("bloom", "mpt", "falcon_rw", "codegen")  # they do not pass keywords on to attention


@pytest.fixture(autouse=True)
def in_float64():
    with exactly():
        yield


def set_up(group, model, tp):
    grid, model = group.grid(ulysses=tp), copy.deepcopy(model)
    replaced = replace_attention(model, tp=grid.ulysses)
    return model, replaced, SequenceParallel(model, seqpar.RingAttention(grid.ring)), grid


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [*((name, False) for name in SILENT), ("bloom", True), ("gpt_neox", True)],
)
def test_checkpointed_layers_recompute_the_call_that_they_were_in(name, reentrant):
    """Two calls of other lengths and paddings are made before either goes backward, the first one last."""
    model, batches = FUSED[name].make(), [batch_of(2, LENGTH), batch_of(3, 8)]
    batches[1]["attention_mask"] = torch.ones(3, 8, dtype=torch.long)
    batches[1]["attention_mask"][0, :2] = 0
    batches[1]["labels"][0, :3] = -100
    steps = [one_device(model, batch, "next", "eager") for batch in batches]
    want = {n: steps[0].gradients[n] + 2 * steps[1].gradients[n] for n in steps[0].gradients}

    def on_rank(group):
        mine, replaced, sp, grid = set_up(group, model, 2)
        options = {"use_reentrant": reentrant}
        mine.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        mine.enable_input_require_grads()
        losses = [sp.loss(batch) for batch in batches]
        (2 * losses[1]).backward()
        losses[0].backward()
        seqpar.sum_gradients(mine.parameters(), grid.ring)
        return whole_gradients(mine, replaced, want)

    for got in seqpar.simulate(4, on_rank):
        for n, gradient in want.items():
            torch.testing.assert_close(got[n], gradient, **EXACT, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize(
    ("name", "side"), [*((name, "left") for name in SILENT), ("llama", "right")]
)
def test_padded_rows_equal_one_device(name, side):
    model, batch = FUSED[name].make(), batch_of(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, : LENGTH // 3] = 0
    mask = mask if side == "left" else mask.flip(1)
    batch["attention_mask"], seen = mask, mask.bool()
    batch["labels"] = batch["input_ids"].masked_fill(~seen, -100)
    if side == "left":
        batch["labels"][1, LENGTH // 3] = -100  # padding would predict it
    want = one_device(model, batch, "next", "eager")
    for got in seqpar.simulate(4, replaced_step, model, batch, 2):
        off = differences(got, want, counted=seen)
        assert all(x < 1e-11 for x in off.values()), off


@pytest.mark.parametrize("name", ["bloom", "mpt", "codegen", "gpt2"])
def test_packed_documents_equal_documents_alone(name):
    """By `cu_seq_lens_q`, also in models of ALiBi, which take no positions."""
    model, (first, second) = FUSED[name].make(), (batch_of(1, 6), batch_of(1, 7))
    alone = copy.deepcopy(model)
    want = torch.cat([alone(input_ids=b["input_ids"]).logits for b in (first, second)], 1)
    batch = {"input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1)}
    batch["cu_seq_lens_q"] = torch.tensor([0, 6, 13])
    if name in ("codegen", "gpt2"):
        batch["position_ids"] = torch.cat([torch.arange(6), torch.arange(7)])[None]

    def on_rank(group):
        mine, _, sp, grid = set_up(group, model, 2)
        inputs = sp.shard(batch)
        logits = mine(**inputs).logits
        return seqpar.unshard_sequence(logits, inputs.layout, grid.ring)

    for got in seqpar.simulate(4, on_rank):
        torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bloom", {"attention_dropout": 0.3}),
        ("falcon_rw", {"attention_dropout": 0.3, "parallel_attn": True}),
        ("gpt2", {"attn_pdrop": 0.3}),
    ],
)
def test_the_same_weights_are_dropped_for_any_tp_and_sp(name, options):
    model, batch = FUSED[name].make(**options), batch_of(2, LENGTH)
    (want,) = seqpar.simulate(1, lambda g: replaced_step(g, model, batch, 1, seed=5))
    without = FUSED[name].make(**{n: 0.0 if "drop" in n else x for n, x in options.items()})
    undropped = one_device(without, batch, "next", "eager")
    assert (want.loss - undropped.loss).abs() > 1e-3
    for tp, sp in ((3, 1), (2, 2)):
        steps = seqpar.simulate(
            tp * sp, lambda g, tp=tp: replaced_step(g, model, batch, tp, seed=5)
        )
        for got in steps:
            off = differences(got, want)
            assert all(x < 1e-11 for x in off.values()), off


def test_without_tensor_parallelism_alone_too():
    """One rank in every dimension, by the same five lines."""
    model, batch = FUSED["mpt"].make(), batch_of(2, LENGTH)
    want = one_device(model, batch, "next", "eager")
    replaced = replace_attention(model)
    sp = SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))
    loss = sp.loss(batch)
    loss.backward()
    torch.testing.assert_close(loss, want.loss, **EXACT)
    assert gradients_of(model)
    replaced.restore()
    assert model(**batch).loss.isfinite()
