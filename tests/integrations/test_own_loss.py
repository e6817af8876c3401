"""`sp.loss` is the model's own loss, or is refused: a trial says which, and not the name of a class.

A failure here trains a model on labels that are one token off, which no error and no shape would show.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

import seqpar
from seqpar.integrations.transformers import SequenceParallel, replace_attention
from seqpar.integrations.transformers.probe.own_loss import BY_NAME
from seqpar.testing.models.tiny import SERVED, batch_of

BATCH = batch_of(2, 21)


def llama(kind=LlamaForCausalLM):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=2, **sizes)
    return kind(config).double()


class Unshifted(LlamaForCausalLM):
    """As Whisper's decoder: labels are those of a row's own place, whatever the name says."""

    def forward(self, *args, labels=None, use_cache=False, **kwargs):
        output = super().forward(*args, use_cache=use_cache, **kwargs)
        if labels is not None:
            output["loss"] = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        return output


class Smoothed(LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        if labels is not None:
            rows, labels = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output["loss"] = F.cross_entropy(rows, labels, label_smoothing=0.1)
        return output


def set_up(model):
    return SequenceParallel(model, seqpar.RingAttention(seqpar.Group.alone()))


@pytest.mark.parametrize("name", SERVED)
def test_every_family_does_what_its_trial_found(name):
    assert set_up(SERVED[name].make()).findings.labels == SERVED[name].labels


def test_a_loss_that_does_not_shift_is_that_of_sp():
    made = llama(Unshifted)
    want = made(**BATCH).loss

    def on_rank(group):
        sp = SequenceParallel(copy.deepcopy(made), seqpar.RingAttention(group))
        return sp.findings.labels, sp.loss(BATCH).detach()

    for labels, loss in seqpar.simulate(3, on_rank):
        assert labels == "own"
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert BY_NAME.get(made.loss_type) == "next"


def test_another_loss_is_refused_and_labels_must_be_said():
    sp = set_up(llama(Smoothed))
    assert sp.findings.labels is None
    with pytest.raises(NotImplementedError, match="as a trial of the model with labels found"):
        sp.loss(BATCH)
    with pytest.raises(ValueError, match="say labels='next' or 'own'"):
        sp.shard(BATCH)
    assert sp.shard(BATCH, labels="next").labels is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, Unshifted])
def test_a_loss_in_half_precision_is_told_apart_too(kind, dtype):
    """`Unshifted` computes its loss in the type of its logits, transformers in float32."""
    want = "own" if kind is Unshifted else "next"
    assert set_up(llama(kind).to(dtype)).findings.labels == want


def test_a_loss_that_is_nearly_cross_entropy_is_refused_in_half_precision():
    class Regularised(Unshifted):
        def forward(self, *args, labels=None, **kwargs):
            output = super().forward(*args, labels=labels, **kwargs)
            if labels is not None:
                output["loss"] = output["loss"] * 1.05
            return output

    assert set_up(llama(Regularised).bfloat16()).findings.labels is None


def test_where_all_logits_are_the_same_the_name_decides():
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert set_up(model).findings.labels == "next"


def test_a_head_of_one_class_has_no_cross_entropy():
    """Value and reward heads: their labels are numbers."""
    config = llama().config
    config.num_labels = 1
    sp = set_up(LlamaForTokenClassification(config).double())
    assert sp.findings.labels is None
    with pytest.raises(NotImplementedError, match="is not the cross entropy of each token"):
        sp.loss(BATCH)


def test_a_pooled_head_is_refused_as_ever_and_its_config_left_alone():
    config = llama().config
    config.pad_token_id = 0
    model = LlamaForSequenceClassification(config).double()
    with pytest.raises(NotImplementedError, match="without its pooling or head"):
        set_up(model)
    assert model.config.problem_type is None


def test_labels_that_a_model_does_not_take_are_no_error():
    class Demanding(LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            if labels is not None:
                raise IndexError("labels of another kind, please")
            return super().forward(*args, **kwargs)

    assert set_up(llama(Demanding)).findings.labels is None


def test_logits_that_are_sharded_by_vocabulary_go_by_the_name():
    class Sharded(LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            assert labels is None
            output = super().forward(*args, **kwargs)
            output["logits"] = output["logits"][..., :24]
            return output

    assert set_up(llama(Sharded)).findings.labels == "next"


def test_a_model_without_labels_goes_by_its_name():
    model = AutoModel.from_config(llama().config).double()
    assert set_up(model).findings.labels == "next"


def test_the_mode_and_the_gradients_of_a_model_are_left_alone():
    model = llama().train()
    set_up(model)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_replacing_keeps_what_was_found():
    """The trial is that of the model while it attended by itself."""
    model = llama(Unshifted)
    replace_attention(model)
    assert set_up(model).findings.labels == "own"
