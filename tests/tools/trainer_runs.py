"""Runs of Trainer, on one device and on shared sequences, and what is compared of them."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import peft
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments
from under_torchrun import among_neighbours, as_torchrun_has_it

import seqpar
from seqpar.integrations.trainer import SequenceParallelTrainer
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import FAMILIES, VOCABULARY

PADDING = 0
SEQUENCES, STEPS = 24, 6


def examples(count=SEQUENCES):
    """Sequences of several lengths; of some most tokens are a prompt, which has no labels."""
    generator = torch.Generator().manual_seed(1)
    for n in range(count):
        ids = torch.randint(1, VOCABULARY, (9 + 5 * n % 12,), generator=generator)
        labels = ids.clone()
        labels[: 5 * n % 8] = -100
        yield {"input_ids": ids, "labels": labels}


class Stream(torch.utils.data.IterableDataset):
    """The same, without a length."""

    def __iter__(self):
        return examples()


def collate(sequences, *, left=False, drawn=False):
    """A padded batch; what is padding has no labels, and neither has the first token behind it.

    Args:
        drawn: whether more labels are left out at random, as collators for masked language models do.
    """
    length = max(len(x["input_ids"]) for x in sequences)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for x in sequences:
        missing = length - len(x["input_ids"])
        pad = (missing, 0) if left else (0, missing)
        labels = x["labels"].clone()
        if left and missing:
            labels[0] = -100
        if drawn:
            labels[torch.rand(len(labels)) < 0.2] = -100
        batch["input_ids"].append(F.pad(x["input_ids"], pad, value=PADDING))
        batch["labels"].append(F.pad(labels, pad, value=-100))
        batch["attention_mask"].append(F.pad(torch.ones_like(labels), pad, value=0))
    return {name: torch.stack(rows) for name, rows in batch.items()}


def wide_loss(outputs, labels, num_items_in_batch=None, smoothing=0.0):
    """In float64: Trainer's own way casts logits to float32."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def metrics(prediction):
    """What depends on the order of rows and tokens; logits of padding mean nothing, and are left out."""
    labels = prediction.label_ids
    logits = prediction.predictions * (labels != -100)[..., None]
    weights = np.arange(logits.size).reshape(logits.shape) % 1001
    right = (logits.argmax(-1)[:, :-1] == labels[:, 1:]).sum()
    return {"right": int(right), "sum": float((weights * logits).sum()), "rows": len(logits)}


@dataclass(frozen=True)
class Run:
    """One way to train; all ways of one problem must end alike."""

    folder: str
    family: str = "persimmon"  # no norms of it are in float32
    replicas: int = 1
    strategy: type = seqpar.RingAttention
    accumulate: int = 2
    lora: bool = False
    sequences: int = SEQUENCES
    left: bool = False
    drawn: bool = False
    evaluated: int = 8
    evaluate_first: bool = False
    resume: str | None = None
    steps: int = STEPS
    options: dict = field(default_factory=dict)

    def arguments(self, ranks):
        """Those of Trainer."""
        settings = {
            "output_dir": self.folder, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": self.accumulate, "max_steps": self.steps, "logging_steps": 1,
            "learning_rate": 3e-3, "max_grad_norm": 0.5, "lr_scheduler_type": "linear", "report_to": [],
            "eval_strategy": "steps", "eval_steps": self.steps // 2, "save_strategy": "no", "seed": 3,
            "adam_epsilon": 1e-4,  # gradients that are 0 but for rounding make no steps
            "include_num_input_tokens_seen": "non_padding", "use_cpu": True, "disable_tqdm": True,
            "ddp_find_unused_parameters": False, "dataloader_pin_memory": False,
        }  # fmt: skip
        if ranks > 1:
            settings["ddp_backend"] = "gloo"
        return TrainingArguments(**settings | self.options)

    def model(self):
        model = (FAMILIES | FUSED)[self.family].make()
        if not self.lora:
            return model
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=["query_key_value"], init_lora_weights=False)
        return peft.get_peft_model(model, config)


def report(trainer, run):
    before = [trainer.evaluate()["eval_loss"]] if run.evaluate_first else []
    trainer.train(resume_from_checkpoint=run.resume)
    logs = trainer.state.log_history
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    weights = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in named}
    predicted = trainer.predict(trainer.eval_dataset)
    return {
        "steps": [
            tuple(x[k] for k in ("step", "loss", "learning_rate", "epoch", "num_input_tokens_seen"))
            for x in logs if "loss" in x
        ],
        "before": before,
        "norms": [x["grad_norm"] for x in logs if "loss" in x],
        "evaluated": [
            tuple(x[f"eval_{k}"] for k in ("loss", "right", "sum", "rows")) for x in logs if "eval_loss" in x
        ],
        "predicted": torch.from_numpy(predicted.predictions)[torch.from_numpy(predicted.label_ids) != -100],
        "labels": predicted.label_ids.tolist(),
        "test_loss": predicted.metrics["test_loss"],
        "flops": logs[-1]["total_flos"],
        "weights": {n: p.detach().clone() for n, p in weights.items() if p.requires_grad},
    }  # fmt: skip


def data_of(run):
    whole = list(examples(run.sequences))
    return {
        "train_dataset": whole,
        "eval_dataset": whole[: run.evaluated],
        "data_collator": partial(collate, left=run.left, drawn=run.drawn),
        "compute_metrics": metrics,
    }


def on_one_device(group, run):
    as_torchrun_has_it(group)
    arguments = run.arguments(1)
    smoothing = arguments.label_smoothing_factor
    trainer = Trainer(
        run.model(), arguments, compute_loss_func=partial(wide_loss, smoothing=smoothing), **data_of(run)
    )  # fmt: skip
    trainer.label_smoother = None
    return report(trainer, run)


def shared(group, run, make=SequenceParallelTrainer):
    as_torchrun_has_it(group)
    attend = among_neighbours(run.strategy, group, run.replicas)
    return report(make(run.model(), run.arguments(group.size), attend=attend, **data_of(run)), run)
