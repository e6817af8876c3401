"""DeepSpeed ZeRO around a sequence-parallel model, as docs/sharded-weights.md has it: one process's steps."""

import os
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from pages.blocks import blocks_of
from pages.run_blocks import execute
from tiny_decoder import Decoder, dense, packed
from torch.distributed.device_mesh import init_device_mesh

import seqpar
from seqpar.integrations.transformers import SequenceParallel
from seqpar.testing.models.fused import FUSED
from seqpar.testing.models.tiny import batch_of

STEPS, MICRO_BATCHES, CLIP = 20, 2, 0.5
# ZeRO steps in float32.
CLOSE = {"rtol": 5e-5, "atol": 5e-6}


@cache
def one_process():
    """(losses of the last micro-batches, norms, weights), of the mean over all tokens of a step."""
    model = Decoder().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        micros = [packed(step, r, micro) for r in range(2) for micro in range(MICRO_BATCHES)]
        found = [x.losses(model(x.ids, x.positions, dense(x.documents))) for x in micros]
        loss = torch.cat(found).mean()
        loss.backward()
        last = torch.cat(found[MICRO_BATCHES - 1 :: MICRO_BATCHES]).sum() / len(torch.cat(found))
        losses.append(last.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {n: p.detach() for n, p in model.named_parameters()}


def token_losses(sharers, model, batch, layout):
    attend = partial(seqpar.RingAttention(sharers, mask=batch["mask"]), layout=layout)
    logits = model(batch["input_ids"], batch["position_ids"], attend)
    return F.cross_entropy(logits.mT, batch["labels"], reduction="none")


def micro_batch(sequence, sharers):
    mask = seqpar.Mask(causal=True, documents=sequence.documents)
    batch = dict(zip(("input_ids", "labels", "position_ids"), sequence, strict=False))
    batch, layout = seqpar.shard_batch(batch, sharers, mask=mask, labels="next_in_document")
    return batch | {"mask": mask}, layout


def engine_of(group, stage, model, **options):
    os.environ |= {"LOCAL_RANK": str(group.rank), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.init_distributed("gloo")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return {
        "deepspeed": deepspeed,
        "model": model,
        "optimizer": optimizer,
        "config": config | options,
    }


def steps_of_the_page(group, stage):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    sharers, replica = seqpar.Group.of(mesh["sp"]), mesh["dp"].get_local_rank()
    names = engine_of(group, stage, Decoder().float(), gradient_accumulation_steps=MICRO_BATCHES)
    (block,) = (b for b in blocks_of("docs/sharded-weights.md") if "deepspeed" in b.text)
    losses, norms = [], []

    def look():
        losses.append(names["loss"].detach())
        norms.append(torch.as_tensor(float(names["engine"].get_global_grad_norm())))

    def steps():
        for step in range(STEPS):
            if step:
                look()
            sequences = [packed(step, replica, micro) for micro in range(MICRO_BATCHES)]
            yield [micro_batch(x, sharers) for x in sequences]

    names |= {"seqpar": seqpar, "everyone": group, "steps": steps()}
    names["token_losses"] = partial(token_losses, sharers)
    execute([replace(block, mark="run")], names)
    look()
    model = names["model"]
    with names["deepspeed"].zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return losses, norms, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_one_process(unused_processes, stage):
    pytest.importorskip("deepspeed")
    want = one_process()
    assert min(want[1]) > CLIP, "every step is clipped"
    for found in unused_processes(4).run(steps_of_the_page, stage):
        torch.testing.assert_close(found, want, **CLOSE)


def of_transformers(group, stage):
    """Its engine is called with a shard; gradients of an engine are not summed again."""
    names = engine_of(group, stage, FUSED["persimmon"].make(torch.float32))
    sp = SequenceParallel(names["model"], seqpar.RingAttention(group))
    engine, *_ = names.pop("deepspeed").initialize(**names)
    shard = sp.shard(batch_of(2, 13))
    loss = sp.loss_of(engine(**shard).logits, shard, gradients="mean")
    with pytest.raises(NotImplementedError, match="DeepSpeedEngine reduces gradients itself"):
        seqpar.backward(loss, engine, group)
    engine.backward(loss)
    engine.step()
    return loss.detach(), float(engine.get_global_grad_norm())


@pytest.mark.parametrize("stage", [1, 3])
def test_an_engine_round_a_model_of_transformers_equals_one_process(unused_processes, stage):
    pytest.importorskip("deepspeed")
    model, batch = FUSED["persimmon"].make(torch.float32), batch_of(2, 13)
    loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    for found in unused_processes(2).run(of_transformers, stage):
        torch.testing.assert_close(found, (loss.detach(), float(norm)), **CLOSE)
