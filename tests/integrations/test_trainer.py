"""Trainer on shared sequences equals Trainer on one device: losses, norms, weights, metrics, resumed runs."""

import os
import re
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import seqpar
from seqpar.integrations.trainer import SequenceParallelTrainer
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import FAMILIES, RELEASE, VOCABULARY

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning"),
]
PADDING = 0
SEQUENCES, STEPS = 24, 20
EXACT = {"rtol": 1e-11, "atol": 1e-12}
LOGGED = {"rel": 1e-6}  # Trainer adds up what it logs in float32


def examples(count=SEQUENCES):
    """Sequences of several lengths; of some most tokens are a prompt, which has no labels."""
    generator = torch.Generator().manual_seed(1)
    for n in range(count):
        ids = torch.randint(1, VOCABULARY, (9 + 5 * n % 12,), generator=generator)
        labels = ids.clone()
        labels[: 5 * n % 8] = -100
        yield {"input_ids": ids, "labels": labels}


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
    options: dict = field(default_factory=dict)

    def arguments(self, ranks):
        """Those of Trainer."""
        settings = {
            "output_dir": self.folder, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": self.accumulate, "max_steps": STEPS, "logging_steps": 1,
            "learning_rate": 3e-3, "max_grad_norm": 0.5, "lr_scheduler_type": "linear", "report_to": [],
            "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "no", "seed": 3,
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


def as_torchrun_has_it(group):
    """Tells accelerate which process of how many this one is, and forgets what it was told before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if group.size > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        rank, size = str(group.rank), str(group.size)
        os.environ |= dict(zip(names, (rank, rank, size, size), strict=True))


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
    attend = run.strategy
    if run.replicas > 1:
        mesh = init_device_mesh(
            "cpu", (run.replicas, group.size // run.replicas), mesh_dim_names=("dp", "sp")
        )
        attend = attend(seqpar.Group.of(mesh["sp"]))
    return report(make(run.model(), run.arguments(group.size), attend=attend, **data_of(run)), run)


def assert_alike(got, want):
    for mine, theirs in zip(got["steps"], want["steps"], strict=True):
        assert mine == pytest.approx(theirs, **LOGGED)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-11)
    for mine, theirs in zip(got["evaluated"], want["evaluated"], strict=True):
        assert mine == pytest.approx(theirs, **LOGGED)
    assert got["before"] == pytest.approx(want["before"], rel=1e-11)
    assert got["labels"] == want["labels"]
    assert got["flops"] == pytest.approx(want["flops"])
    assert got["test_loss"] == pytest.approx(want["test_loss"], rel=1e-11)
    torch.testing.assert_close(got["predicted"], want["predicted"], **EXACT)
    assert got["weights"].keys() == want["weights"].keys()
    for name, weight in want["weights"].items():
        torch.testing.assert_close(
            got["weights"][name], weight, **EXACT, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def train(unused_processes, tmp_path):
    """Trains in so many processes, and gives what the first reports."""

    def run(size, fn, *args, **problem):
        problem = {"folder": str(tmp_path / f"{fn.__name__}_{size}")} | problem
        return unused_processes(size).run(fn, Run(**problem), *args, timeout=240)[0]

    return run


def test_twenty_steps_equal_one_device(train):
    """The last batch of an epoch has one sequence, and its last step one batch; labels are smoothed."""
    problem = {
        "sequences": 23,
        "options": {"label_smoothing_factor": 0.1},
        "evaluated": 7,
        "evaluate_first": True,
    }
    want = train(1, on_one_device, **problem)
    for size in (1, 3):
        assert_alike(train(size, shared, **problem), want)


def test_replicas_of_ranks_equal_one_device(train):
    """Two replicas of two ranks with two micro-batches a step take what one process takes in four."""
    want = train(1, on_one_device, accumulate=4)
    assert_alike(train(4, shared, replicas=2, strategy=seqpar.UlyssesAttention), want)


def test_a_run_is_resumed_with_other_ranks(train, tmp_path):
    want = train(1, on_one_device, accumulate=4)
    saving = {"save_strategy": "steps", "save_steps": 10}
    train(2, shared, folder=str(tmp_path / "saved"), accumulate=4, options=saving)
    place = str(tmp_path / "saved" / "checkpoint-10")
    resumed = [(1, {"accumulate": 4})]
    if RELEASE >= (5, 24):  # older ones cannot load an optimizer in several processes on CPUs
        resumed.append((4, {"replicas": 2}))
    for size, problem in resumed:
        got = train(size, shared, resume=place, **problem)
        torch.testing.assert_close(got["predicted"], want["predicted"], **EXACT)
        for name, weight in want["weights"].items():
            torch.testing.assert_close(got["weights"][name], weight, **EXACT)
        assert got["steps"][-1][2:] == pytest.approx(want["steps"][-1][2:])
    model = AutoModelForCausalLM.from_pretrained(place)  # as on one device, without this package
    assert model.config._attn_implementation == "sdpa"


def test_adapters_are_trained_with_padding_on_the_left_and_labels_that_are_drawn(train):
    problem = {"lora": True, "left": True, "drawn": True}
    want = train(1, on_one_device, **problem)
    got = train(2, shared, **problem)
    assert all("lora" in name for name in got["weights"])
    assert_alike(got, want)


class OnGpus(Trainer):
    """What accelerate makes of a ParallelismConfig and FSDP2; it refuses them on CPUs."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        config = ParallelismConfig(cp_size=2, dp_shard_size=self.args.world_size // 2)
        state.parallelism_config, state.device_mesh = config, config.get_device_mesh("cpu")
        state.distributed_type, self.is_fsdp_enabled = DistributedType.FSDP, True
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["PersimmonDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )


class ShardedOnGpus(SequenceParallelTrainer, OnGpus):
    pass


@pytest.mark.filterwarnings("ignore:Slicing a flattened dim:UserWarning")  # by accelerate
def test_the_mesh_of_accelerate_is_taken_and_weights_are_sharded_over_all(train):
    want = train(1, on_one_device, accumulate=4)
    assert_alike(train(4, shared, ShardedOnGpus), want)


class PenalisedOnOneDevice(Trainer):
    """A loss with something added that is computed from whole rows."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{n: x for n, x in inputs.items() if n != "labels"})
        loss = wide_loss(outputs, inputs["labels"], num_items_in_batch) + penalty(outputs, inputs)
        return (loss, outputs) if return_outputs else loss


class Penalised(SequenceParallelTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + penalty(outputs, inputs)
        return (loss, outputs) if return_outputs else loss


def penalty(outputs, inputs):
    """Of neighbours that differ, so that the order of rows counts; halved for two micro-batches."""
    shown = inputs["attention_mask"].bool()
    logits = outputs.logits.masked_fill(~shown[..., None], 0.0)
    return 1e-3 * (logits[:, 1:] - logits[:, :-1]).square().sum(-1)[shown[:, 1:]].mean() / 2


def penalised_on_one_device(group, run):
    as_torchrun_has_it(group)
    trainer = PenalisedOnOneDevice(run.model(), run.arguments(1), **data_of(run))
    trainer.model_accepts_loss_kwargs = True
    return report(trainer, run)


def test_what_is_added_to_a_loss_has_its_gradient(train):
    got, want = train(2, shared, Penalised), train(1, penalised_on_one_device)
    for name, weight in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, **EXACT)
    for mine, theirs in zip(got["evaluated"], want["evaluated"], strict=True):
        assert mine == pytest.approx(theirs, **LOGGED)


def dropping(group, run, resume):
    """Weights after a run whose attention drops weights; and what torch draws in a step, and after it."""
    as_torchrun_has_it(group)
    model = FAMILIES["llama"].make(attention_dropout=0.4)
    made = SequenceParallelTrainer(
        model, run.arguments(group.size), attend=run.strategy, **data_of(run)
    )
    made.train(resume_from_checkpoint=resume)
    with made.drawn_apart(model.train()):
        inside = torch.rand(3).tolist()
    return {n: p.detach() for n, p in model.named_parameters()}, inside, torch.rand(3).tolist()


def test_dropout_is_the_same_for_any_ranks_and_resumed(unused_processes, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 10}
    run = Run(folder=str(tmp_path), options=saving)
    pair = unused_processes(2)
    (want, first, after), (_, second, after_too) = pair.run(dropping, run, None)
    assert first != second, "rows of two ranks drop alike"
    assert after == after_too
    alone = unused_processes(1)
    for place in (None, str(tmp_path / "checkpoint-10")):
        ((got, _, _),) = alone.run(dropping, run, place)
        for name, weight in want.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-6)


class Theirs(Trainer):
    def compute_loss(self, *_, **__):
        return torch.zeros(())


class Mixed(SequenceParallelTrainer, Theirs):
    pass


def refused(group, run, make, options, keywords):
    as_torchrun_has_it(group)
    options = options[group.rank] if isinstance(options, list) else options
    arguments = run.arguments(group.size)
    for name, value in options.items():
        setattr(arguments, name, value)
    attend = keywords.pop("attend", run.strategy)
    with pytest.raises((NotImplementedError, ValueError, seqpar.DesyncError)) as caught:
        make(run.model(), arguments, attend=attend, **data_of(run), **keywords)
    return f"{caught.type.__name__}: {caught.value}"


REFUSED = {
    "their own loss": (Mixed, {}, {}, "Theirs beside .* own compute_loss"),
    "a function of losses": (None, {}, {"compute_loss_func": wide_loss}, "compute_loss_func"),
    "noise": (None, {"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha"),
    "balanced batches": (None, {"train_sampling_strategy": "batch_rebalance"}, {}, "batch_rebalance"),
    "objects": (None, {"eval_use_gather_object": True}, {}, "eval_use_gather_object"),
    "smaller batches": (None, {"auto_find_batch_size": True}, {}, "auto_find_batch_size"),
    "seeds": (None, [{"seed": 3}, {"seed": 4}], {}, "DesyncError: .*seed"),
    "compilation": (None, {"torch_compile": True}, {}, "torch_compile"),
    "other labels": (None, {"label_names": ["targets"]}, {}, "label_names"),
    "a mask": (None, {}, {"attend": partial(seqpar.RingAttention, mask=seqpar.Mask(causal=True))}, "mask"),
}  # fmt: skip


def refused_all(group, run):
    return {
        name: refused(group, run, make or SequenceParallelTrainer, options, dict(keywords))
        for name, (make, options, keywords, _) in REFUSED.items()
    }


def test_what_would_be_wrong_is_refused_by_every_rank(unused_processes, tmp_path):
    for found in unused_processes(2).run(refused_all, Run(folder=str(tmp_path))):
        for name, (*_, message) in REFUSED.items():
            assert re.search(message, found[name]), (name, found[name])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return examples()


def misused(group, run):
    """What is said of a stream to evaluate on, of gradients nobody adds; and what is drawn after resuming."""
    as_torchrun_has_it(group)
    made = SequenceParallelTrainer(
        run.model(), run.arguments(group.size), attend=run.strategy, **data_of(run)
    )
    found = []
    with pytest.raises(NotImplementedError) as caught:
        made.evaluate(Stream())
    found.append(str(caught.value))
    with pytest.raises((RuntimeError, seqpar.DesyncError)) as caught:
        made.get_batch_samples(iter(made.get_train_dataloader()), 1, made.args.device)
    found.append(str(caught.value))
    torch.manual_seed(group.rank)
    made._save_rng_state(run.folder)
    torch.distributed.barrier()
    made._load_rng_state(run.folder)
    return *found, torch.rand(3).tolist()


def test_misuse_is_refused_and_states_are_shared(unused_processes, tmp_path):
    (stream, bare, drawn), (_, _, too) = unused_processes(2).run(misused, Run(folder=str(tmp_path)))
    assert "a data set with a length" in stream
    assert "wrapped neither in DDP nor in FSDP" in bare
    assert drawn == too


def on_a_stream(group, run):
    as_torchrun_has_it(group)
    data = data_of(run) | {"train_dataset": Stream(), "eval_dataset": None}
    trainer = SequenceParallelTrainer(
        run.model(), run.arguments(group.size), attend=run.strategy, **data
    )
    trainer.train()
    return trainer.state.log_history[-1]["train_loss"]


def test_streams_are_read_by_every_process(unused_processes, tmp_path):
    run = Run(folder=str(tmp_path), options={"eval_strategy": "no", "max_steps": 3})
    (want,) = unused_processes(1).run(on_a_stream, run)
    assert unused_processes(2).run(on_a_stream, run) == pytest.approx([want, want], rel=1e-6)
