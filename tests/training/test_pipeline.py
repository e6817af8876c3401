"""Sequences of ranks in a pipeline: losses, gradients and weights are those of one device.

Each micro-batch is packed in its own way, so what is under way at one time has different masks.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_decoder import DEPTH, IGNORE, LENGTH, Decoder, Training, one_device, packed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.utils.checkpoint import checkpoint

import seqpar

MICRO, STEPS, FEW = 4, 10, 2
CLOSE = 1e-10
ATTENTION = {"ring": seqpar.RingAttention, "ulysses": seqpar.UlyssesAttention}


class Stage(nn.Module):
    """Some blocks of the decoder, and how they attend; its documents come with each micro-batch."""

    def __init__(self, decoder, attend, layout):
        super().__init__()
        self.decoder, self.attend, self.layout = decoder, attend, layout

    def forward(self, x, *, position_ids, documents):
        masks = tuple(seqpar.Mask(causal=True, documents=bounds) for bounds in documents)

        def attend(q, k, v):
            self.attend.mask = masks
            return self.attend(q, k, v, self.layout)

        return self.decoder(x, position_ids, attend)


def stages_of(schedule, rank):
    """(the stages of a rank in a pipeline of two, the number of all)."""
    if schedule in ("ZBVZeroBubble", "DualPipeV"):  # down and up again
        return [rank, 3 - rank], 4
    if issubclass(schedules.get_schedule_class(schedule), schedules.PipelineScheduleMulti):
        return [rank, rank + 2], 4
    return [rank], 2


def batch_of(step, replica, sharers):
    """This rank's rows of the micro-batches of a step, one above the other, and their documents."""
    shards, documents = [], []
    for sequence in (packed(step, replica, micro) for micro in range(MICRO)):
        whole = dict(zip(("input_ids", "labels", "position_ids"), sequence, strict=False))
        mask = seqpar.Mask(causal=True, documents=sequence.documents)
        shards.append(seqpar.shard_batch(whole, sharers, mask=mask, labels="next_in_document")[0])
        # As long as the longest: what is added are empty documents.
        documents.append(sequence.documents + (LENGTH,) * (5 - len(sequence.documents)))
    rows = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    return rows, torch.tensor(documents)


def as_it_is(stage, _):
    return stage


def train(group, schedule, strategy="ring", dp=1, steps=STEPS, prepare=as_it_is, gradients="sum"):
    """What one rank's stages have of `Trained`, and how many elements it sent among its sharers.

    Args:
        prepare: makes of a stage, and of the mesh of all ranks that hold it, what is run.
        gradients: as in `mean_loss`; those that are no sum are reduced by what `prepare` has done.
    """
    mesh = init_device_mesh(
        "cpu", (2, dp, group.size // 2 // dp), mesh_dim_names=("pp", "dp", "sp")
    )
    sharers, replica = seqpar.Group.of(mesh["sp"]), mesh["dp"].get_local_rank()
    same_stage = mesh["dp", "sp"]._flatten("same_stage")
    everyone = seqpar.Group.of(same_stage)
    numbers, count = stages_of(schedule, mesh["pp"].get_local_rank())
    models = []
    for n in numbers:
        # A group of its own for each stage, as where each is made by itself.
        attend = ATTENTION[strategy](seqpar.Group.of(mesh["sp"]))
        decoder = Decoder(range(n * DEPTH // count, (n + 1) * DEPTH // count))
        models.append(Stage(decoder, attend, seqpar.zigzag(LENGTH, sharers.size)))

    def loss_fn(logits, labels):
        losses = F.cross_entropy(logits.mT, labels, reduction="none")
        valid = labels != IGNORE
        return seqpar.mean_loss(
            losses, everyone, valid=valid, num_tokens=total, gradients=gradients
        )

    ends = mesh["pp"].get_group()
    stages = [
        PipelineStage(prepare(model, same_stage), n, count, torch.device("cpu"), group=ends)
        for model, n in zip(models, numbers, strict=True)
    ]
    kind = schedules.get_schedule_class(schedule)
    is_single = issubclass(kind, schedules.PipelineScheduleSingle)
    runs = kind(stages[0] if is_single else stages, MICRO, loss_fn=loss_fn, scale_grads=False)
    assert len({id(model.attend.group.calls) for model in models}) == 1
    training = Training(*(model.decoder for model in models))
    for step in range(steps):
        batch, documents = batch_of(step, replica, sharers)
        total, losses = seqpar.count_tokens(batch["labels"] != IGNORE, everyone), []
        given = {"position_ids": batch["position_ids"], "documents": documents}
        ids = (batch["input_ids"],) if 0 in numbers else ()
        runs.step(*ids, target=batch["labels"], losses=losses, return_outputs=False, **given)
        if gradients == "sum":
            seqpar.sum_gradients([p for model in models for p in model.parameters()], everyone)
        training.finish(sum(losses) if losses else None)
    return training.result, sum(model.attend.group.traffic.total.elements for model in models)


def check(results, dp=1, steps=STEPS):
    """Every weight is held by some stage, and all are right; the losses of the last stage are."""
    whole = one_device(steps, dp, MICRO)
    found = [trained for trained, _ in results]
    assert {name for x in found for name in x.weights} == set(whole.weights)
    assert any(x.losses for x in found)
    for trained in found:
        off = trained.differences(whole)
        assert max(off.values()) < CLOSE, off


@pytest.mark.parametrize(
    ("schedule", "strategy"),
    [("1F1B", "ring"), ("1F1B", "ulysses"), ("GPipe", "ring"), ("Interleaved1F1B", "ulysses")],
)
def test_a_pipeline_trains_as_one_device(four_processes, schedule, strategy):
    check(four_processes.run(train, schedule, strategy))


@pytest.mark.parametrize(
    "schedule", ["LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
)
def test_so_do_other_schedules(four_processes, schedule):
    """Those with zero bubbles go back for gradients of inputs first, and later for those of weights."""
    check(four_processes.run(train, schedule, "ring", 1, FEW), steps=FEW)


def test_replicas_of_a_pipeline_train_as_one_device(eight_processes):
    check(eight_processes.run(train, "1F1B", "ring", 2), 2)


def sharded(stage, mesh):
    for part in (*stage.decoder.blocks.values(), stage):
        fully_shard(part, mesh=mesh)
    return stage


def test_stages_under_fsdp_train_as_one_device(four_processes):
    """Over all ranks that hold the stage; it averages over them, and only in the last backward of a step."""
    check(four_processes.run(train, "1F1B", "ring", 1, FEW, sharded, "mean"), steps=FEW)


def checkpointed(stage, _, **options):
    for block in stage.decoder.blocks.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return stage


CHECKPOINTING = {
    "none": as_it_is,
    "full": checkpointed,
    "keep-attention": partial(checkpointed, context_fn=seqpar.keep_attention),
}


def sent_by(group, schedule, strategy):
    """What is right, and elements sent, by kind of checkpointing."""
    return {
        name: train(group, schedule, strategy, 1, FEW, prepare)
        for name, prepare in CHECKPOINTING.items()
    }


@pytest.mark.parametrize(("schedule", "strategy"), [("1F1B", "ring"), ("ZBVZeroBubble", "ulysses")])
def test_checkpointed_stages_train_as_one_device(four_processes, schedule, strategy):
    """What is recomputed while other micro-batches are under way has the mask of its own."""
    by_rank = four_processes.run(sent_by, schedule, strategy)
    for name in CHECKPOINTING:
        check([found[name] for found in by_rank], steps=FEW)
    for found in by_rank:
        none, full, kept = (found[name][1] for name in CHECKPOINTING)
        assert kept == none < full


def compiled(stage, _):
    return torch.compile(stage, backend="aot_eager")


def test_compiled_stages_train_as_one_device(four_processes):
    """Their documents are read outside: numbers that come with a tensor break a graph."""
    check(four_processes.run(train, "1F1B", "ring", 1, FEW, compiled), steps=FEW)


def refuses_to_split(group):
    with pytest.raises(RuntimeError, match="not supported with stage modules"):
        train(group, "ZBVZeroBubble", prepare=compiled)
    return group.rank


def test_a_compiled_backward_is_not_split(four_processes):
    assert four_processes.run(refuses_to_split) == [0, 1, 2, 3]


def out_of_step(group):
    """One stage of two sharers that run different schedules."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "sp"))
    sharers = seqpar.Group.of(mesh["sp"])
    stage = Stage(Decoder(), seqpar.RingAttention(sharers), seqpar.zigzag(LENGTH, 2))
    stage = PipelineStage(stage, 0, 1, torch.device("cpu"), group=mesh["pp"].get_group())
    kind = (schedules.Schedule1F1B, schedules.ScheduleGPipe)[group.rank]
    runs = kind(stage, MICRO, loss_fn=lambda logits, _: logits.sum(), scale_grads=False)
    batch, documents = batch_of(0, 0, sharers)
    given = {"position_ids": batch["position_ids"], "documents": documents}
    try:
        runs.step(batch["input_ids"], target=batch["labels"], return_outputs=False, **given)
    except RuntimeError as error:
        return repr(error.__cause__)
    raise AssertionError("ranks were in two micro-batches at a time")


def test_sharers_that_run_micro_batches_in_other_orders_are_told(unused_processes):
    for told in unused_processes(2).run(out_of_step):
        assert told.startswith("DesyncError"), told
        assert "'backward of attention number" in told, told
        assert "'attention' on rank 1" in told, told
