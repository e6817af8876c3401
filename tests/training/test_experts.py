"""Experts spread over ranks that share sequences, or over others: all is as on one device."""

from functools import partial

import pytest
import torch.nn.functional as F
from spread_experts import Experts
from tiny_decoder import DEPTH, IGNORE, Decoder, Training, one_device, packed
from torch.distributed.device_mesh import init_device_mesh

import seqpar

STEPS, CLOSE = 10, 1e-10
ATTENTION = {"ring": seqpar.RingAttention, "ulysses": seqpar.UlyssesAttention}


def train(group, strategy, shape, names, over):
    """What one rank has of `Trained`, and which experts.

    Args:
        shape, names: of the mesh; along sp ranks share sequences, and along the others they have their own.
        over: the dimension whose ranks hold the experts among them.
    """
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    sharers, everyone = seqpar.Group.of(mesh["sp"]), seqpar.Group.of()
    others = tuple(name for name in names if name != over)
    alike = seqpar.Group.of(mesh[others] if len(others) == 1 else mesh[others]._flatten("alike"))
    replica = group.rank // sharers.size
    decoder = Decoder(experts=partial(Experts, mesh[over].get_group()))
    experts = [p for name, p in decoder.named_parameters() if name in decoder.held]
    rest = [p for name, p in decoder.named_parameters() if name not in decoder.held]
    training, attention = Training(decoder), ATTENTION[strategy](sharers)
    for step in range(STEPS):
        sequence = packed(step, replica, 0)
        mask = seqpar.Mask(causal=True, documents=sequence.documents)
        whole = dict(zip(("input_ids", "labels", "position_ids"), sequence, strict=False))
        shard, layout = seqpar.shard_batch(whole, sharers, mask=mask, labels="next_in_document")
        attention.mask = mask
        attend = partial(attention, layout=layout)
        logits = decoder(shard["input_ids"], shard["position_ids"], attend)
        losses = F.cross_entropy(logits.mT, shard["labels"], reduction="none")
        loss = seqpar.mean_loss(losses, everyone, valid=shard["labels"] != IGNORE)
        loss.backward()
        if step == 0:
            with pytest.raises(seqpar.DesyncError, match="the copy of parameter"):
                seqpar.sum_gradients(decoder.parameters(), everyone)
        seqpar.sum_gradients(rest, everyone)
        seqpar.sum_gradients(experts, alike)
        training.finish(loss)
    return training.result, decoder.held


def check(results, replicas):
    for trained, held in results:
        assert len(held) == 2 * DEPTH
        off = trained.differences(one_device(STEPS, replicas, 1, Experts).of(held))
        assert max(off.values()) < CLOSE, off


@pytest.mark.parametrize("strategy", ATTENTION)
@pytest.mark.parametrize("over", ["sp", "ep"])
def test_experts_over_sharers_and_over_replicas_train_as_on_one_device(
    four_processes, strategy, over
):
    """Over sp with replicas beside, or over ep, whose ranks have sequences of their own."""
    names = ("dp", "sp") if over == "sp" else ("ep", "sp")
    check(four_processes.run(train, strategy, (2, 2), names, over), 2)


def test_experts_over_all_sharers_are_held_once(four_processes):
    """Then nobody else holds an expert, and there is nothing to sum."""
    check(four_processes.run(train, "ring", (1, 4), ("dp", "sp"), "sp"), 1)


def test_experts_beside_replicas_train_as_on_one_device(eight_processes):
    check(eight_processes.run(train, "ring", (2, 2, 2), ("dp", "ep", "sp"), "ep"), 4)
