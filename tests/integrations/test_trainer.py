"""Trainer on shared sequences equals Trainer on one device: losses, norms, weights, metrics, resumed runs."""

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from trainer_runs import Run, Stream, data_of, on_one_device, report, shared, wide_loss
from transformers import AutoModelForCausalLM, Trainer
from under_torchrun import as_torchrun_has_it

import seqpar
from seqpar.integrations.trainer import SequenceParallelTrainer
from seqpar.testing.models.tiny import FAMILIES, RELEASE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning"),
]
EXACT = {"rtol": 1e-11, "atol": 1e-12}
LOGGED = {"rel": 1e-6}  # Trainer adds up what it logs in float32


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
        "steps": 20,
        "options": {"label_smoothing_factor": 0.1},
        "evaluated": 7,
        "evaluate_first": True,
    }
    want = train(1, on_one_device, **problem)
    for size in (1, 3):
        assert_alike(train(size, shared, **problem), want)


def test_replicas_of_ranks_equal_one_device(train):
    """Two replicas of two ranks with two micro-batches a step take what one process takes in four."""
    want = train(1, on_one_device, accumulate=4, steps=20)
    assert_alike(train(4, shared, replicas=2, strategy=seqpar.UlyssesAttention, steps=20), want)


def test_a_run_is_resumed_with_other_ranks(train, tmp_path):
    want = train(1, on_one_device, accumulate=4)
    saving = {"save_strategy": "steps", "save_steps": 3}
    train(2, shared, folder=str(tmp_path / "saved"), accumulate=4, options=saving)
    place = str(tmp_path / "saved" / "checkpoint-3")
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
    saving = {"save_strategy": "steps", "save_steps": 3}
    run = Run(folder=str(tmp_path), options=saving)
    pair = unused_processes(2)
    (want, first, after), (_, second, after_too) = pair.run(dropping, run, None)
    assert first != second, "rows of two ranks drop alike"
    assert after == after_too
    alone = unused_processes(1)
    for place in (None, str(tmp_path / "checkpoint-3")):
        ((got, _, _),) = alone.run(dropping, run, place)
        for name, weight in want.items():
            torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-6)


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
