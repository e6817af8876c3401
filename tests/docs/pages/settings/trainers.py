"""What the blocks of docs/trainers.md need."""

import warnings
from contextlib import chdir, contextmanager
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from pages.models import saved
from seqpar.integrations.trainer import SequenceParallelTrainer
from seqpar.testing.models.tiny import FAMILIES, batch_of


@contextmanager
def what_a_script_has():
    """A model on disk, sequences, and a folder to write to."""
    whole = batch_of(8, 13)
    dataset = [{name: x[n] for name, x in whole.items()} for n in range(8)]
    with saved(FAMILIES["llama"].make(torch.float32)) as path, TemporaryDirectory() as folder:
        yield {"path": path, "dataset": dataset, "output_dir": folder}


def trainer():
    with what_a_script_has() as names:
        yield names
    assert names["trainer"].state.global_step == 3


def replicas():
    with what_a_script_has() as names:
        arguments = TrainingArguments(
            names["output_dir"], max_steps=1, use_cpu=True, ddp_backend="gloo"
        )
        names |= {"arguments": arguments, "model": FAMILIES["llama"].make()}
        names["Trainer"] = SequenceParallelTrainer
        yield names
        names["trainer"].train()
        assert len(names["trainer"].replicas.members) == 2


def trl():
    from datasets import Dataset
    from trl import DPOConfig

    words = Tokenizer(WordLevel({"yes": 0, "no": 1, "why": 2, "end": 3}, unk_token="end"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="end", eos_token="end")
    pairs = [{"prompt": "why why", "chosen": " yes yes no", "rejected": " no"}] * 4
    with TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder, max_steps=2, use_cpu=True, bf16=False, ddp_backend="gloo", report_to=[],
            per_device_train_batch_size=2, gradient_checkpointing=False,
        )  # fmt: skip
        names = {"arguments": arguments, "pairs": Dataset.from_list(pairs), "tokenizer": tokenizer}
        with saved(FAMILIES["llama"].make(torch.float32)) as path:
            names["model"] = AutoModelForCausalLM.from_pretrained(path)
            yield names
    assert names["trainer"].state.global_step == 2


def accelerate():
    model = FAMILIES["llama"].make()
    whole = batch_of(4, 13)
    dataset = [{name: x[n] for name, x in whole.items()} for n in range(4)]
    names = {"model": model, "loader": DataLoader(dataset, batch_size=2)}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    yield names
    assert names["loss"].isfinite()


def lightning():
    whole = batch_of(8, 13)
    dataset = [{name: x[n] for name, x in whole.items()} for n in range(8)]
    warnings.simplefilter("ignore", UserWarning)  # of loaders without workers, and the like
    with TemporaryDirectory() as folder, chdir(folder):  # where checkpoints go
        names = {"model": FAMILIES["llama"].make(), "loader": DataLoader(dataset, batch_size=1)}
        yield names
    assert names["trainer"].global_step == 2
