"""`Policy`: which weights of a model are cut how, as data. `apply` does it; `policies` has those built in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from seqpar.tensor_parallel.cut import Form

Split = Literal[
    "output", "paired output", "input", "vocabulary", "width", "each head", "replicate", "fused heads"
]  # fmt: skip

# What a module reads and writes by the nature of its split.
_NATURAL: dict[str, tuple[Form, Form]] = {
    "output": ("whole", "sharded"),
    "paired output": ("whole", "sharded"),
    "input": ("sharded", "whole"),
    "vocabulary": ("whole", "whole"),
    "width": ("sharded", "sharded"),
    "each head": ("sharded", "sharded"),
    "replicate": ("whole", "whole"),
    "fused heads": ("whole", "whole"),
}


@dataclass(frozen=True)
class Rule:
    r"""How weights are cut whose path in the model matches, and with them the biases it matches.

    `split` is one of:
      "output": by output features (rows of nn.Linear, columns of GPT-2's Conv1D), and the bias.
      "paired output": the same where the rows are two halves, as gate and up: part of both on each rank.
      "input": by input features; the bias is on every rank and added once.
      "vocabulary": the rows of an embedding or of the head, which need not divide by the ranks.
      "width": the columns of an embedding; the weight of an RMS norm over a sharded width.
      "each head": a norm of single heads, which is on every rank while the heads are sharded.
      "replicate": on every rank, and so is what it computes on.
      "fused heads": may not be cut here; refused unless its module is already tensor parallel.

    Args:
        pattern: a regular expression for the whole path, such as `r".*\.o_proj\.weight"`.
        reads, writes: whether the module's input and output between modules are "whole" on every rank or
            "sharded" in their last dimension; by default what the split takes and gives. Another form is
            converted, by communication.
        unit: attribute of the module above it which counts rows that must stay together, as "head_dim".

    Raises:
        ValueError: no such split or form, or the pattern is no regular expression.
    """

    pattern: str
    split: Split
    reads: Form | None = None
    writes: Form | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split must be one of {get_args(Split)}, got {self.split!r}")
        for name in ("reads", "writes"):
            if getattr(self, name) not in (None, *get_args(Form)):
                raise ValueError(
                    f"{name} must be one of {get_args(Form)}, got {getattr(self, name)!r}"
                )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression: {error}") from error

    @property
    def forms(self) -> tuple[Form, Form]:
        """What its modules read and write."""
        reads, writes = _NATURAL[self.split]
        return self.reads or reads, self.writes or writes

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        return re.fullmatch(self.pattern, path) is not None


@dataclass(frozen=True)
class Policy:
    """Rules for every weight of a model. Each must be matched by exactly one, and each rule match one."""

    name: str
    rules: tuple[Rule, ...]

    def assign(self, model: nn.Module) -> dict[str, Rule]:
        """The rule of every parameter that the policy has to place, by path, tied ones under each.

        Raises:
            ValueError: a weight is matched by no rule or by several, a rule matches none, or weight and
                bias of a module are matched by different rules.
        """
        found: dict[str, Rule] = {}
        for path in weight_paths(model):
            matching = [rule for rule in self.rules if rule.matches(path)]
            if len(matching) != 1:
                shape = tuple(model.get_parameter(path).shape)
                what = " and ".join(f"{r.pattern!r} ({r.split})" for r in matching) or "no rule"
                raise ValueError(
                    f"exactly one rule of policy {self.name} must match each weight, {path} {shape} is "
                    f"matched by {what}"
                )
            found[path] = matching[0]
        idle = [rule.pattern for rule in self.rules if rule not in found.values()]
        if idle:
            raise ValueError(
                f"rules of policy {self.name} match no weight: {', '.join(map(repr, idle))}; the pattern "
                "must match the whole path of a weight that is not already tensor parallel"
            )
        by_module: dict[str, Rule] = {}
        for path, rule in found.items():
            module = path.rpartition(".")[0]
            if by_module.setdefault(module, rule) != rule:
                raise ValueError(
                    f"one rule of policy {self.name} must match all weights of {module}, got "
                    f"{by_module[module].pattern!r} and {rule.pattern!r}"
                )
        return found


def weight_paths(model: nn.Module) -> Iterator[str]:
    """The paths of all parameters outside of modules that are already tensor parallel."""
    own = [p for p, m in model.named_modules(remove_duplicate=False) if is_tensor_parallel(m)]
    for path, _ in model.named_parameters(remove_duplicate=False):
        if not any(path.startswith(f"{p}." if p else "") for p in own):
            yield path


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether a module has cut its own weights already, and says so."""
    return getattr(module, "is_tensor_parallel", False) is True
