"""Lightning on shared sequences: losses, norms, clipping, evaluation and weights are those of one process."""

from functools import cache

import pytest
import torch
from lightning_runs import BATCH, CLIP, Module, Run, by_hand, sequences, trained, trainer_of
from torch.utils.data import DataLoader, DistributedSampler

import seqpar
from seqpar.integrations.lightning import SequenceParallelFSDPStrategy, SequenceParallelStrategy

by_hand = cache(by_hand)
EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize("run", [Run(attend=seqpar.UlyssesAttention), Run(fsdp=True)])
def test_a_module_trains_as_in_one_process(four_processes, tmp_path, run):
    """`compared`: losses, norms, evaluated losses, weights."""
    compared = by_hand()
    assert min(compared[1]) > CLIP, "every step is clipped"
    for found, _ in four_processes.run(trained, run, tmp_path):
        torch.testing.assert_close(found, compared, **EXACT)


def test_a_run_is_resumed_with_other_ranks_and_replicas(four_processes, unused_processes, tmp_path):
    _, norms, _, weights = by_hand()
    _, saved = four_processes.run(trained, Run(epochs=2), tmp_path)[0]
    for found, _ in unused_processes(2).run(trained, Run(micro=4), tmp_path, saved):
        torch.testing.assert_close(found[1], norms[10:], **EXACT)
        torch.testing.assert_close(found[3], weights, **EXACT)


class Wrong(Module):
    """Does one thing wrong, on the ranks that do."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.automatic_optimization = what != "manual"

    def training_step(self, batch, number):
        if self.what == "one rank alone" and self.global_rank == 1:
            raise ArithmeticError("only here")
        if self.what == "a loss of its own":
            return self.sp.loss(batch)
        if self.what == "two losses":
            return super().training_step(batch, number) + super().training_step(batch, number)
        return super().training_step(batch, number)


class Unsharded(Module):
    """Leaves out what FSDP2 would sum."""

    def configure_model(self):
        self.sp = self.trainer.strategy.sequence_parallel(self.model)


def refused(group):
    data, errors = sequences(8), (ValueError, NotImplementedError, RuntimeError)
    over_processes = DistributedSampler(data, group.size, group.rank)
    for what, match, options in (
        ("three ranks", "no multiple of ranks=3", {}),
        ("manual", "manual optimization", {"accumulate_grad_batches": 1}),
        ("other options", "accumulate_grad_batches", {"accumulate_grad_batches": 1 + group.rank}),
        ("sampler", "DistributedSampler deals out to 4 processes", {}),
        ("no sampler", "give all 2 replicas the same", {"use_distributed_sampler": False}),
        ("a loss of its own", r"must return a loss of self\.trainer\.strategy", {}),
        ("two losses", "must make one loss where .* got 2", {}),
        ("one rank alone", "only here", {}),
    ):
        strategy = SequenceParallelStrategy(seqpar.RingAttention, 3 if what == "three ranks" else 2)
        options = {"accumulate_grad_batches": 2} | options
        trainer = trainer_of(
            group,
            strategy,
            enable_checkpointing=False,
            max_steps=1,
            num_sanity_val_steps=0,
            **options,
        )
        loader = DataLoader(data, BATCH, sampler=over_processes if what == "sampler" else None)
        with pytest.raises((*errors, ArithmeticError), match=match):
            trainer.fit(Wrong(what), loader)
    trainer = trainer_of(group, SequenceParallelFSDPStrategy(seqpar.RingAttention, 2), max_steps=1)
    with pytest.raises(ValueError, match="is not sharded over all 4 ranks"):
        trainer.fit(Unsharded(), DataLoader(data, BATCH))


def test_what_would_train_otherwise_is_refused_on_every_rank(four_processes):
    four_processes.run(refused)


def test_a_module_that_has_a_group_already_is_refused():
    attend = seqpar.RingAttention(seqpar.Group.alone())
    with pytest.raises(TypeError, match="such as the class"):
        SequenceParallelStrategy(attend)
