"""Tensors beside the batch of a model: rows of theirs for a loss of one's own, and nothing for the model."""

import copy

import pytest
import torch
import torch.nn.functional as F

import seqpar
from seqpar.integrations.transformers import SequenceParallel
from seqpar.testing.models.tiny import FAMILIES, batch_of
from seqpar.testing.models.training_step import DENSE, gradients_of

LENGTH = 19


def weighed_batch():
    """Weights of the tokens that are predicted, in places 0, and an offset for each row."""
    generator = torch.Generator().manual_seed(0)
    weights, offsets = torch.rand(2, 2, LENGTH, generator=generator, dtype=torch.float64)
    return batch_of(2, LENGTH) | {"weights": (weights - 0.2).clamp(min=0), "offsets": offsets}


def weighed(logits, labels, weights, offsets):
    losses = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
    return (losses + offsets).square() * weights


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_weighed_loss_equals_one_device(size):
    """Weights are shifted as labels are, offsets stay with their rows."""
    model, batch = FAMILIES["llama"].make(), weighed_batch()
    whole = copy.deepcopy(model)
    whole.set_attn_implementation(DENSE)
    logits = whole(batch["input_ids"], use_cache=False).logits[:, :-1]
    later = [batch[name][:, 1:] for name in ("labels", "weights")]
    counted = later[0] != -100
    want = weighed(logits, *later, batch["offsets"][:, :-1])[counted].mean()
    want.backward()

    def fn(group):
        mine = copy.deepcopy(model)
        sp = SequenceParallel(mine, seqpar.RingAttention(group))
        inputs = sp.shard(batch, sequences=["offsets"], shifted=["weights"])
        assert inputs.beside.keys() == {"weights", "offsets"}
        assert not inputs.keys() & inputs.beside.keys()
        labels = inputs.labels
        losses = weighed(mine(**inputs).logits, labels, **inputs.beside)
        loss = seqpar.mean_loss(losses, group, valid=labels != -100)
        loss.backward()
        seqpar.sum_gradients(mine.parameters(), group)
        return loss.detach(), gradients_of(mine)

    for loss, gradients in seqpar.simulate(size, fn):
        torch.testing.assert_close(loss, want.detach(), rtol=1e-10, atol=1e-10)
        for name, gradient in gradients_of(whole).items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_the_loss_of_the_model_takes_nothing_from_what_is_beside():
    model, batch = FAMILIES["llama"].make(), weighed_batch()

    def fn(group):
        sp = SequenceParallel(copy.deepcopy(model), seqpar.RingAttention(group))
        plain = {name: batch[name] for name in ("input_ids", "labels")}
        loss = sp.loss(batch, sequences=["offsets"], shifted=["weights"])
        assert torch.equal(loss, sp.loss(plain))
        assert sp.shard(plain).beside == {}
        with pytest.raises(ValueError, match=r"is \['weights'\] a sequence"):
            sp.shard(batch, sequences=["offsets"])
        with pytest.raises(ValueError, match="name tensors in sequences="):
            sp.shard(batch, sequences=["offsets"], shifted=["weights"], labels="own")

    seqpar.simulate(2, fn)


@pytest.mark.parametrize("axis", ["sequence", "tp"])
def test_ranks_that_shift_other_tensors_are_told_along_either_axis(axis):
    """Ranks of tp hold the same rows, and would weigh them differently."""
    model, batch = FAMILIES["llama"].make(), weighed_batch()

    def fn(group):
        alone = seqpar.Group.alone()
        over, tp = (group, alone) if axis == "sequence" else (alone, group)
        sp = SequenceParallel(copy.deepcopy(model), seqpar.RingAttention(over), tp=tp)
        names = ["weights", "offsets"]
        options = [{"shifted": names}, {"sequences": names}][group.rank // 2]
        with pytest.raises(seqpar.DesyncError, match=r"sequences is .* on ranks 0, 1.* on rank 2"):
            sp.shard(batch, **options)
        return True

    assert seqpar.simulate(3, fn) == [True] * 3
