"""One projection, cut by output or by input: what a rank sends, from how x arrives and y is wanted.

The ring's cost of each collective is in `seqpar.tensor_parallel.collectives`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from seqpar import Group
from seqpar.tensor_parallel.collectives import Collectives

By = Literal["output", "input"]
Held = Literal["whole", "part"]  # on every rank the whole width, or a part of it on each
TOKENS = 3
WIDTHS = ((12, 24), (24, 12))


@dataclass(frozen=True)
class Projection:
    """y = W x: x is `inputs` wide, and y, or all that are computed from the same x, `outputs`.

    Args:
        inputs, outputs: features.
        arrives: how ranks hold x.
        wanted: how ranks are to hold y.
    """

    inputs: int
    outputs: int
    arrives: Held
    wanted: Held

    def sent(self, by: By, size: int) -> tuple[float, float]:
        """Elements that each of `size` ranks sends for a token, forward and backward.

        The gradient of y comes as y is wanted and that of x leaves as x arrives.
        """
        e, m = self.inputs, self.outputs
        if by == "output":  # x must be whole; y comes in parts
            forward = e * (self.arrives == "part") + m * (self.wanted == "whole")
            backward = e if self.arrives == "part" else 2 * e
        else:  # x must be in parts; y comes as terms of a sum
            forward = m if self.wanted == "part" else 2 * m
            backward = m * (self.wanted == "part") + e * (self.arrives == "whole")
        return (size - 1) * forward / size, (size - 1) * backward / size


def all_projections() -> list[Projection]:
    """Wider and narrower ones, for all ways to hold x and y."""
    held = get_args(Held)
    return [Projection(*widths, a, w) for widths, a, w in product(WIDTHS, held, held)]


def count_projections(group: Group) -> list[dict[str, Any]]:
    """What torch's styles send for each of them and by each cut, against the formula. All ranks must call."""
    mesh = init_device_mesh("cpu", (group.size,))
    form: dict[Held, Placement] = {"whole": Replicate(), "part": Shard(-1)}
    styles = {"output": ColwiseParallel, "input": RowwiseParallel}
    records = []
    for one, (by, style) in product(all_projections(), styles.items()):
        layer = nn.Linear(one.inputs, one.outputs, bias=False)
        layouts = {"input_layouts": form[one.arrives], "output_layouts": form[one.wanted]}
        parallelize_module(layer, mesh, style(**layouts))
        width = one.inputs // (group.size if one.arrives == "part" else 1)
        x = torch.ones(TOKENS, width, requires_grad=True)
        with Collectives() as forward:
            y = layer(x)
        with Collectives() as backward:
            y.backward(torch.ones_like(y))
        counted = [float(sum(c.sent().values())) / TOKENS for c in (forward, backward)]
        formula = list(one.sent(by, group.size))
        records.append(
            {
                "inputs": one.inputs, "outputs": one.outputs, "arrives": one.arrives,
                "wanted": one.wanted, "by": by, "counted": counted, "formula": formula,
            }
        )  # fmt: skip
    return records
