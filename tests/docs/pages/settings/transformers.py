"""What the blocks of docs/transformers.md need."""

from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM

from pages.models import saved
from seqpar.integrations.transformers import SequenceParallel
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import FAMILIES, batch_of


def use():
    with TemporaryDirectory() as path:
        FAMILIES["llama"].make(torch.float32).save_pretrained(path)
        names = {"path": path, "batch": batch_of(2, 13)}
        yield names
    assert names["loss"].isfinite()


def replaced_attention():
    """The imports of the first block are the reader's."""
    with saved(FUSED["bloom"].make(torch.float32)) as path:
        names = {"path": path, "tp_size": 2, "batch": batch_of(2, 13)}
        names.update(AutoModelForCausalLM=AutoModelForCausalLM, SequenceParallel=SequenceParallel)
        yield names
    assert names["loss"].isfinite()
