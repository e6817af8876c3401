"""All that saves memory at once, over ranks and under wrappers, has the gradients of one device.

Blocks are recomputed but for their attention, their inputs wait on the host, MLPs and the loss are in tiles,
and the head is the embedding.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import seqpar
from seqpar import Mask

LENGTH, WIDTH, VOCABULARY, TILE = 21, 8, 12, 3


class Block(nn.Module):
    def __init__(self, lean):
        super().__init__()
        self.lean, self.norm, self.qkv = lean, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x, attend):
        if not self.lean:
            return self._forward(x, attend)
        options = {"use_reentrant": False, "context_fn": seqpar.keep_attention}
        return checkpoint(self._forward, x, attend, **options)

    def _forward(self, x, attend):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 4)).unbind(2)
        x = x + attend(q, k, v).flatten(2)
        return x + self.mlp(x)


class Model(nn.Module):
    """Losses of its rows."""

    def __init__(self, lean):
        super().__init__()
        self.lean, self.embedding = lean, nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(lean) for _ in range(2))
        self.double()
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, ids, labels, attend):
        x, weight = self.embedding(ids), self.embedding.weight
        if not self.lean:
            for block in self.blocks:
                x = block(x, attend)
            return F.cross_entropy((x @ weight.T).mT, labels, reduction="none")
        with seqpar.saved_on_host(least_bytes=0):
            for block in self.blocks:
                x = block(x, attend)
        return seqpar.tiled_loss(x, weight, labels, tile=TILE)


def batches():
    for n in range(2):
        ids = torch.arange(2 * LENGTH).view(2, -1) * (n + 3) % VOCABULARY
        yield {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == n, -100)}


def one_device():
    def dense(*qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    model, losses = Model(lean=False), []
    for batch in batches():
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        losses.append(model(batch["input_ids"], labels, dense)[labels != -100])
    torch.cat(losses).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def wrapped(model, wrapper):
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    if wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (4,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def trained(group, attention, wrapper):
    model = Model(lean=True)
    with seqpar.tiled_mlps(model, tile=TILE):
        return in_tiles(group, attention, wrapper, model)


def in_tiles(group, attention, wrapper, model):
    """The gradients by name. Both micro-batches go forward first, but under wrappers."""
    run, attend = wrapped(model, wrapper), attention(group, mask=Mask(causal=True))
    shards = [seqpar.shard_batch(batch, group) for batch in batches()]
    valid = [shard["labels"] != -100 for shard, _ in shards]
    options = {"num_tokens": seqpar.count_tokens(valid, group)}
    options["gradients"] = "mean" if wrapper else "sum"
    losses = []
    for (shard, layout), counts in zip(shards, valid, strict=True):
        of_rows = run(
            shard["input_ids"], shard["labels"], lambda *qkv, layout=layout: attend(*qkv, layout)
        )
        losses.append(seqpar.mean_loss(of_rows, group, valid=counts, **options))
        if wrapper:
            losses.pop().backward()
    for loss in losses:
        loss.backward()
    if not wrapper:
        seqpar.sum_gradients(model, group)
    named = model.named_parameters()
    return {n: p.grad.full_tensor() if wrapper == "fsdp" else p.grad for n, p in named}


@pytest.mark.parametrize("wrapper", ["", "ddp", "fsdp"])
@pytest.mark.parametrize("attention", [seqpar.RingAttention, seqpar.UlyssesAttention])
def test_gradients_are_those_of_one_device(four_processes, attention, wrapper):
    want = one_device()
    for got in four_processes.run(trained, attention, wrapper):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def outside_of_forward(_):
    model = wrapped(Model(lean=True), "fsdp")
    x, labels = torch.zeros(2, WIDTH, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    said = []
    for call in (
        lambda: seqpar.tiled_loss(x, model.embedding.weight, labels, tile=1),
        lambda: seqpar.tiled(model.blocks[0].mlp, x[None], tile=1),
    ):
        try:
            call()
        except NotImplementedError as error:
            said.append(str(error))
    return said


def test_outside_of_the_forward_of_what_fsdp_wraps_they_say_where_to_go(four_processes):
    for said in four_processes.run(outside_of_forward):
        assert len(said) == 2
        assert all("inside of the forward of the module that it wraps" in text for text in said)
