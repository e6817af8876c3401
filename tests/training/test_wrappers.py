"""DDP and FSDP2 around a sequence-parallel model: gradients, norms and steps of one device."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import seqpar
from seqpar import Group

IGNORE = -100
RTOL = {torch.float64: 1e-11, torch.float32: 2e-5}
STEPS = 3


class Model(nn.Module):
    """An embedding, a block of attention and MLP, a head; the shapes do not divide by four."""

    def __init__(self, group, dtype):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 12), nn.Linear(12, 11)
        # No bias: the gradient of that of keys is 0 but for rounding, which AdamW makes a step of.
        self.qkv, self.out = nn.Linear(12, 36, bias=False), nn.Linear(12, 12)
        self.mlp = nn.Sequential(nn.Linear(12, 21), nn.GELU(), nn.Linear(21, 12))
        self.attention = seqpar.RingAttention(group, mask=seqpar.Mask(causal=True))
        generator = torch.Generator().manual_seed(0)
        self.to(dtype)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=generator)

    def forward(self, ids, layout):
        x = self.embedding(ids)
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).unbind(2)
        x = x + self.out(self.attention(q, k, v, layout).flatten(2))
        return self.head(x + self.mlp(x))


def batches(step, replica, micro):
    """Two sequences of 9 tokens. Replicas have different numbers of labels, the first none at first."""
    generator = torch.Generator().manual_seed(100 * step + 10 * replica + micro)
    ids = torch.randint(11, (2, 9), generator=generator)
    share = 0.0 if replica == micro == 0 else 0.2 + 0.6 * replica
    counts = torch.rand(2, 9, generator=generator) < share
    return {"input_ids": ids, "labels": ids.masked_fill(~counts, IGNORE)}


def losses_of(model, shard, layout):
    logits, labels = model(shard["input_ids"], layout), shard["labels"]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses, labels.flatten() != IGNORE


def full(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def one_device(dtype, dp, num_micro, clip):
    """What `steps` gives, from torch alone but for attention: the mean over all tokens of a step."""
    model = Model(Group.alone(), dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    results = []
    for step in range(STEPS):
        losses = []
        for replica in range(dp):
            for micro in range(num_micro):
                shard, layout = seqpar.shard_batch(batches(step, replica, micro), Group.alone())
                found, counts = losses_of(model, shard, layout)
                losses.append(found[counts])
        loss = torch.cat(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        results.append(finish(model, optimizer, loss.detach(), clip))
    return results


def finish(model, optimizer, loss, clip):
    """(loss, norm, gradients before clipping, parameters after the step)."""
    gradients = [full(p.grad) for p in model.parameters()]
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss, full(norm), gradients, [full(p) for p in model.parameters()]


def steps(group, how, dtype, dp, num_micro, clip):
    mesh = init_device_mesh("cpu", (dp, group.size // dp), mesh_dim_names=("dp", "sp"))
    sharers, replica = Group.of(mesh["sp"]), mesh["dp"].get_local_rank()
    model = Model(sharers, dtype)
    gradients = "sum" if how in ("plain", "fsdp that sums") else "mean"
    if how == "ddp":
        model = DistributedDataParallel(model)
    elif how.startswith("fsdp"):
        where = {"fsdp of the flattened mesh": mesh._flatten("all"), "fsdp of replicas": mesh}
        for part in (model.mlp, model):
            fully_shard(part, mesh=where.get(how))
            if how == "fsdp that sums":
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    results = []
    for step in range(STEPS):
        shards = [
            seqpar.shard_batch(batches(step, replica, micro), sharers) for micro in range(num_micro)
        ]
        total = seqpar.count_tokens([shard["labels"] != IGNORE for shard, _ in shards], group)
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=dtype)
        for n, (shard, layout) in enumerate(shards):
            is_last = n == len(shards) - 1
            if how == "ddp":
                model.require_backward_grad_sync = is_last
            elif how == "fsdp that waits":
                model.set_requires_gradient_sync(is_last)
            losses, counts = losses_of(model, shard, layout)
            part = seqpar.mean_loss(
                losses, group, valid=counts, num_tokens=total, gradients=gradients
            )
            part.backward()
            loss += part.detach()
        if how == "plain":
            seqpar.sum_gradients(model.parameters(), group)
        results.append(finish(model, optimizer, loss, clip))
    return results


@pytest.mark.parametrize(
    ("how", "dtype", "dp", "num_micro"),
    [
        ("plain", torch.float64, 2, 2),
        ("ddp", torch.float64, 2, 2),
        ("ddp", torch.float32, 1, 2),
        ("fsdp", torch.float64, 2, 2),
        ("fsdp", torch.float32, 4, 2),
        ("fsdp of the flattened mesh", torch.float64, 1, 2),
        ("fsdp of replicas", torch.float32, 2, 2),
        ("fsdp that waits", torch.float64, 2, 2),
        ("fsdp that sums", torch.float32, 2, 2),
    ],
)
def test_a_wrapped_model_trains_as_on_one_device(four_processes, how, dtype, dp, num_micro):
    """Replica 0 has no valid token in its first micro-batch; replicas have different numbers of them."""
    expected = one_device(dtype, dp, num_micro, clip=0.1)
    assert all(norm > 0.1 for _, norm, *_ in expected), "every step is clipped"
    for found in four_processes.run(steps, how, dtype, dp, num_micro, 0.1):
        for got, want in zip(found, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=RTOL[dtype], atol=RTOL[dtype])


def sum_sharded_gradients(group):
    model = nn.Linear(4, 4)
    fully_shard(model)
    with pytest.raises(NotImplementedError, match="DTensor"):
        seqpar.sum_gradients(model.parameters(), group)
    return dist.get_world_size()


def test_gradients_that_fsdp_has_reduced_are_not_summed_again(four_processes):
    assert four_processes.run(sum_sharded_gradients) == [4] * 4
