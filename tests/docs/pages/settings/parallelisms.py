"""What the blocks of docs/parallelisms.md need; both check the norm of the gradient, and the loss."""

from functools import partial

import torch
import torch.nn.functional as F
from spread_experts import Experts
from tiny_decoder import DEPTH, LENGTH, Decoder, dense, packed
from torch.distributed.device_mesh import init_device_mesh

import seqpar


def whole_step(sequences, experts=None):
    """(loss, norm of the gradient) of one device."""
    decoder = Decoder(experts=experts)
    losses = [x.losses(decoder(x.ids, x.positions, dense(x.documents))) for x in sequences]
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.detach(), torch.nn.utils.get_total_norm([p.grad for p in decoder.parameters()])


def batch_of(sequence):
    names = "input_ids", "labels", "position_ids"
    return dict(zip(names, sequence, strict=False))


def pipeline():
    rank, num_micro = torch.distributed.get_rank(), 3
    sequences = [packed(0, 0, micro) for micro in range(num_micro)]
    names = {"pp": 2, "dp": 1, "sp": 2, "length": LENGTH, "num_micro": num_micro, "longest": 5}
    names["layers_of"] = lambda n: Decoder(range(n * DEPTH // 2, (n + 1) * DEPTH // 2))
    names["micro_batches"] = [(batch_of(x), x.documents) for x in sequences]
    yield names
    loss, norm = whole_step(sequences)
    torch.testing.assert_close(names["norm"], norm)
    assert len(names["losses"]) == (num_micro if rank >= 2 else 0)
    if rank >= 2:
        torch.testing.assert_close(sum(names["losses"]), loss)


def experts():
    sequences = [packed(0, 0, 1), packed(0, 1, 0)]  # one document each
    names = {"ep": 2, "dp": 1, "sp": 2, "init_device_mesh": init_device_mesh}
    names["batch"] = batch_of(sequences[torch.distributed.get_rank() // 2])

    def make_model(sharers, ep):
        decoder = Decoder(experts=partial(Experts, ep))
        names["names_of_experts"] = list(decoder.held)
        names["attention"] = seqpar.RingAttention(sharers, mask=seqpar.Mask(causal=True))
        return decoder

    def token_losses(model, shard, layout):
        attend = partial(names["attention"], layout=layout)
        logits = model(shard["input_ids"], shard["position_ids"], attend)
        return F.cross_entropy(logits.mT, shard["labels"], reduction="none")

    names |= {"make_model": make_model, "token_losses": token_losses}
    yield names
    loss, norm = whole_step(sequences, Experts)
    torch.testing.assert_close(names["loss"], loss)
    torch.testing.assert_close(names["norm"], norm)
