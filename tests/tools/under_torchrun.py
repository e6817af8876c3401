"""Processes of a world as accelerate finds those that torchrun started; and which of them share sequences."""

from __future__ import annotations

import os
from collections.abc import Callable

from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh

import seqpar
from seqpar.integrations.accelerate import Attend


def as_torchrun_has_it(group: seqpar.Group) -> None:
    """Tells accelerate which process of how many this one is, and forgets what it was told before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if group.size > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        rank, size = str(group.rank), str(group.size)
        os.environ |= dict(zip(names, (rank, rank, size, size), strict=True))


def among_neighbours(
    strategy: Callable[[seqpar.Group], seqpar.Attention], group: seqpar.Group, replicas: int
) -> Attend:
    """What trainers take as `attend` where so many replicas are neighbours that share sequences."""
    if replicas == 1:
        return strategy
    shape = replicas, group.size // replicas
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "sp"))
    return strategy(seqpar.Group.of(mesh["sp"]))
