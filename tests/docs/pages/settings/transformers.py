"""What the blocks of docs/transformers.md need."""

from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

import seqpar
from pages.models import saved
from seqpar.integrations.transformers import SequenceParallel
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.seeing import SEEING
from seqpar.testing.models.tiny import FAMILIES, batch_of


def use():
    with TemporaryDirectory() as path:
        FAMILIES["llama"].make(torch.float32).save_pretrained(path)
        names = {"path": path, "batch": batch_of(2, 13)}
        yield names
    assert names["loss"].isfinite()


def models_that_see():
    """A processor's answer, without its tokenizer."""
    family = SEEING["gemma3_vl"]
    batch = family.seen(batch_of(2, 23))
    labels = batch.pop("labels")
    group = seqpar.Group.of()
    names = {"model": family.make(torch.float32), "labels": labels, "images": [], "texts": []}
    names.update(processor=lambda **_: batch, SequenceParallel=SequenceParallel, group=group)
    yield names
    assert all(p.grad.any() for p in names["model"].model.vision_tower.encoder.parameters())


def replaced_attention():
    """The imports of the first block are the reader's."""
    with saved(FUSED["bloom"].make(torch.float32)) as path:
        names = {"path": path, "tp_size": 2, "batch": batch_of(2, 13)}
        names.update(AutoModelForCausalLM=AutoModelForCausalLM, SequenceParallel=SequenceParallel)
        yield names
    assert names["loss"].isfinite()
