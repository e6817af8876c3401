"""Gradients of parameters that are sharded over tp add up over the other ranks, and over no more."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import seqpar
from seqpar.testing import ProcessWorld

WHOLE = torch.arange(15, dtype=torch.float64).view(5, 3)


def sharded_step(group, placement, has_gradient, dtype=torch.float64):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    replica, over_tp = mesh["dp"].get_local_rank(), mesh["tp"].get_local_rank()
    zeros = torch.zeros_like(WHOLE, dtype=dtype)
    p = nn.Parameter(distribute_tensor(zeros, mesh["tp"], [placement]))
    if has_gradient or replica == 0:
        if isinstance(placement, Replicate):  # each rank of tp has a part of every entry
            part = (WHOLE * (replica + 1) * (0.25 if over_tp == 0 else 0.75)).to(dtype)
            p.grad = DTensor.from_local(part, mesh["tp"], [Partial()])
        else:
            whole = (WHOLE * (replica + 1)).to(dtype)
            p.grad = distribute_tensor(whole, mesh["tp"], [placement])
    try:
        seqpar.sum_gradients([p], group)
    except NotImplementedError as error:
        refused = str(error)
    seqpar.sum_gradients([p], seqpar.Group.of(mesh["dp"]))
    seqpar.sum_gradients([p], seqpar.Group.alone())
    assert p.grad.placements == p.placements  # what an optimizer may take
    return refused, p.grad.full_tensor()


@pytest.fixture(scope="module")
def world():
    with ProcessWorld(4) as world:
        yield world


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_shards_are_added_over_the_ranks_that_hold_the_same(world, placement):
    for refused, total in world.run(sharded_step, placement, True):
        torch.testing.assert_close(total, 3 * WHOLE, rtol=0, atol=0)
        assert "over ranks of the group" in refused


def test_shards_of_16_bits_are_added_in_32(world):
    for _, total in world.run(sharded_step, Shard(0), True, torch.bfloat16):
        torch.testing.assert_close(total, (3 * WHOLE).bfloat16(), rtol=0, atol=0)


def test_a_replica_without_a_gradient_counts_as_zero(world):
    for _, total in world.run(sharded_step, Shard(0), False):
        torch.testing.assert_close(total, WHOLE, rtol=0, atol=0)
