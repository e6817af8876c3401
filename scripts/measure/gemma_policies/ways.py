"""The policies that are compared, and how a model comes under one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar.tensor_parallel import Policy, Rule, apply_policy, contracted, megatron
from seqpar.tensor_parallel.policy import Form, Split, weight_paths

Name = Literal[
    "one process", "Megatron", "contracted", "sharded weights", "Megatron x sharded weights"
]


@dataclass(frozen=True)
class Way:
    """A policy on its mesh.

    Args:
        name: of the policy.
        data: how many ranks the weights are spread over beside it, each with other rows of the batch.
        swap: a projection, as "o_proj", that is cut along the other axis than the policy says. What it
            reads and writes stays, so numbers stay right.
    """

    name: Name
    data: int = 1
    swap: str | None = None

    @staticmethod
    def all(num_ranks: int) -> list[Way]:
        """Those that are compared on so many ranks, 2 or more."""
        both: Name = "sharded weights" if num_ranks == 2 else "Megatron x sharded weights"
        return [Way("Megatron"), Way("contracted"), Way(both, data=2)]

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.name}, {self.swap} swapped" if self.swap else self.name

    @property
    def is_cut(self) -> bool:
        """Whether there is a policy."""
        return self.name != "one process"

    def cut(self, model: nn.Module, num_ranks: int, *, logits: Form) -> DeviceMesh | None:
        """Cuts the model over all ranks, in place; their mesh ("tp", "data"). They must all call."""
        if not self.is_cut:
            return None
        make = contracted if self.name == "contracted" else megatron
        policy = make(model, logits=logits)
        if self.swap:
            policy = swapped(policy, self.swap, model)
        shape = (num_ranks // self.data, self.data)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("tp", "data"))
        apply_policy(model, policy, mesh if self.data > 1 else mesh["tp"])
        return mesh


def swapped(policy: Policy, projection: str, model: nn.Module) -> Policy:
    """The policy with one projection of every layer cut along the other axis; numbers stay."""
    other: dict[str, Split] = {"output": "input", "input": "output"}
    path = rf".*\.{projection}(?:\.base_layer)?\.weight"
    rules = []
    for rule in policy.rules:
        rules.append(replace(rule, pattern=f"(?!{path}$)(?:{rule.pattern})"))
        if rule.split in other:
            rules.append(Rule(f"(?={path}$)(?:{rule.pattern})", other[rule.split], *rule.forms))
    paths = list(weight_paths(model))
    used = (rule for rule in rules if any(map(rule.matches, paths)))
    return Policy(f"{policy.name}, {projection} swapped", tuple(used))
