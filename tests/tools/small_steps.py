"""A step of several micro-batches of a small model: on one device, and by ranks in a block of backwards."""

import torch
from torch import nn

import seqpar
from seqpar import Mask

IGNORE = -100


class Model(nn.Module):
    """An embedding, causal attention by whoever is given it, and a head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(9, 6), nn.Linear(6, 18), nn.Linear(6, 9)
        self.double()
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, ids, attend):
        x = self.embedding(ids)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 3)).unbind(2)
        return self.head(x + attend(q, k, v).flatten(2))


def dense(*qkv):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def micro_batches(num, length):
    """Whole batches `[2 s]` with labels, the first of which counts no token at all."""
    generator = torch.Generator().manual_seed(num + 31 * length)
    for n in range(num):
        ids = torch.randint(9, (2, length), generator=generator)
        counts = torch.rand(ids.shape, generator=generator) < (0.7 if n else 0.0)
        yield {"input_ids": ids, "labels": ids.masked_fill(~counts, IGNORE)}


def token_losses(model, ids, labels, attend):
    logits = model(ids, attend)
    return nn.functional.cross_entropy(
        logits.mT, labels, ignore_index=IGNORE, reduction="none"
    ), labels != IGNORE


def one_device(num, length):
    """The gradients of the mean over all tokens at once."""
    model, losses = Model(), []
    for batch in micro_batches(num, length):
        labels = torch.cat([batch["labels"][:, 1:], torch.full((2, 1), IGNORE)], 1)
        found, counts = token_losses(model, batch["input_ids"], labels, dense)
        losses.append(found.masked_fill(~counts, 0).sum())
        losses.append(found.sum() * 0)
    count = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in micro_batches(num, length))
    (sum(losses) / max(1, count)).backward()
    return [p.grad for p in model.parameters()]


class Ranks:
    """The ranks of one replica among those of all, and what they hold of its micro-batches."""

    def __init__(self, group, replicas, num, length):
        grid = group.grid(ring=replicas)
        self.everyone, self.sharers = group, group if replicas == 1 else grid.ulysses
        replica = grid.index_of(group.rank)[0]
        mine = list(micro_batches(num * replicas, length))[replica::replicas]
        self.shards = [seqpar.shard_batch(batch, self.sharers) for batch in mine]
        self.attend = seqpar.RingAttention(self.sharers, mask=Mask(causal=True))
        valid = [shard["labels"] != IGNORE for shard, _ in self.shards]
        self.total = seqpar.count_tokens(valid, group)

    def loss(self, model, n=0):
        shard, layout = self.shards[n]
        losses, counts = token_losses(
            model, shard["input_ids"], shard["labels"], lambda *qkv: self.attend(*qkv, layout)
        )
        return seqpar.mean_loss(losses, self.everyone, valid=counts, num_tokens=self.total)


def in_a_block(group, replicas, num, length, of):
    ranks, model = Ranks(group, replicas, num, length), Model()
    given = model if of == "model" else model.parameters()
    for _ in range(2):  # a second step begins anew
        model.zero_grad()
        with seqpar.summed_gradients(given, group, axes=(ranks.sharers,)):
            for n in range(num):
                ranks.loss(model, n).backward()
        given = model if of == "model" else model.parameters()
    return [p.grad for p in model.parameters()]


def weight_of(length=2):
    return nn.Parameter(torch.ones(length))
