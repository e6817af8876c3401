"""The policies that are compared, on their meshes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar import Group
from seqpar.tensor_parallel import apply_policy, contracted, megatron

Name = Literal["one process", "Megatron", "contracted", "Megatron x sharded weights"]
MAKERS = {"Megatron": megatron, "contracted": contracted, "Megatron x sharded weights": megatron}


@dataclass(frozen=True)
class Way:
    """A policy by its name, and over how many ranks (tensor parallel, sharding of weights)."""

    name: Name
    shape: tuple[int, int] = (1, 1)

    def mesh(self, group: Group) -> DeviceMesh | None:
        """The mesh of all ranks."""
        return init_device_mesh("cpu", self.shape[:1]) if self.name in MAKERS else None

    def cut(self, model: nn.Module, mesh: DeviceMesh | None) -> None:
        """Cuts the model in place."""
        if mesh is not None:
            apply_policy(model, MAKERS[self.name](model), mesh)
