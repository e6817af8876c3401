"""The policies that are compared, and how a model comes under one of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar import Group
from seqpar.tensor_parallel import Policy, Rule, apply_policy, contracted, megatron
from seqpar.tensor_parallel.policy import Form, Split, weight_paths

Name = Literal["one process", "Megatron", "contracted"]
BUILT_IN = {"Megatron": megatron, "contracted": contracted}


@dataclass(frozen=True)
class Way:
    """A policy.

    Args:
        name: of the policy.
        swap: a projection, as "o_proj", that is cut along the other axis than the policy says. What it
            reads and writes stays, so numbers stay right.
    """

    name: Name
    swap: str | None = None

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.name}, {self.swap} swapped" if self.swap else self.name

    @property
    def is_cut(self) -> bool:
        """Whether there is a policy."""
        return self.name != "one process"

    def cut(self, model: nn.Module, group: Group, *, logits: Form) -> None:
        """Cuts the model over all ranks, in place. They must all call."""
        if not self.is_cut:
            return
        policy = BUILT_IN[self.name](model, logits=logits)
        if self.swap:
            policy = swapped(policy, self.swap, model)
        apply_policy(model, policy, _mesh(group))


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


def _mesh(group: Group) -> DeviceMesh:
    return init_device_mesh("cpu", (group.size,))
