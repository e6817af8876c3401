"""What would give other losses than one device has is refused on shared sequences, by every rank."""

import re
from functools import partial

import pytest
import torch
from trainer_runs import Run, Stream, data_of, wide_loss
from transformers import Trainer
from under_torchrun import among_neighbours, as_torchrun_has_it

import seqpar
from seqpar.integrations.trainer import SequenceParallelTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning"),
]


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


def uneven(group, run):
    as_torchrun_has_it(group)
    attend = among_neighbours(seqpar.RingAttention, group, replicas=2)
    arguments = run.arguments(group.size)
    made = SequenceParallelTrainer(run.model(), arguments, attend=attend, **data_of(run))
    with pytest.raises(seqpar.DesyncError) as caught:
        made.train()
    return str(caught.value)


def test_replicas_that_plan_other_numbers_of_steps_are_refused(unused_processes, tmp_path):
    """Their learning rates would differ from the first step on, and one would wait at the end."""
    options = {
        "max_steps": -1,
        "accelerator_config": {"even_batches": False},
        "eval_strategy": "no",
    }
    run = Run(folder=str(tmp_path), sequences=21, accumulate=1, options=options)
    for text in unused_processes(2).run(uneven, run):
        assert "steps of the run" in text
