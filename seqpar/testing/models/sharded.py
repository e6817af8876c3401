"""A step of a model that is sharded whole: heads, MLPs and vocabulary over tp, sequences over sp."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import seqpar
from seqpar.comm import all_gather
from seqpar.integrations.transformers import SequenceParallel
from seqpar.tensor_parallel import (
    apply_policy,
    megatron,
    replace_attention,
    vocabulary_cross_entropy,
    whole_state,
)
from seqpar.tensor_parallel.cut import Form
from seqpar.tensor_parallel.vocabulary import vocabulary_range
from seqpar.testing.models.training_step import Step, attend_by


def sharded_step(
    mesh: DeviceMesh,
    model: Any,
    batch: Mapping[str, Any],
    strategy: str = "ring",
    *,
    replaces: bool = True,
    logits: Form = "whole",
) -> Step:
    """The step of a copy of the model on this rank of a mesh sp x tp, with gradients of whole weights.

    Args:
        replaces: whether attention is replaced; if not, the policy cuts it with torch's styles.
        logits: as the policy leaves them; "sharded" ones are gathered for the result.
    """
    names = [name for name, _ in model.named_parameters()]
    model = copy.deepcopy(model)
    sp_group, tp_group = seqpar.Group.of(mesh["sp"]), seqpar.Group.of(mesh["tp"])
    replaced = replace_attention(model, tp=tp_group) if replaces else None
    apply_policy(model, megatron(model, logits=logits), mesh["tp"])
    sp = SequenceParallel(model, attend_by(strategy, sp_group), tp=tp_group)
    kept: list[tuple[seqpar.Layout, Tensor]] = []

    def note(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        kept.append((given["seqpar"].plan.layout, output.logits.detach()))

    model.register_forward_hook(note, with_kwargs=True)
    classes = model.config.vocab_size
    by_part = partial(vocabulary_cross_entropy, group=tp_group, vocabulary=classes)
    loss = sp.loss(batch, token_losses=None if logits == "whole" else by_part)
    loss.backward()
    seqpar.sum_gradients(model.parameters(), sp_group)
    layout, rows = kept[0]
    rows = seqpar.unshard_sequence(rows, layout, sp_group)
    if logits == "sharded":
        ranges = (vocabulary_range(classes, r, tp_group.size) for r in range(tp_group.size))
        rows = all_gather(rows, tp_group, [b - a for a, b in ranges], dim=2)
    whole = whole_state(model, gradients=True)
    if replaced is not None:
        with torch.no_grad():
            for replacement in replaced.replacements:
                for parameter in replacement.parameters():
                    assert parameter.grad is not None
                    parameter.copy_(parameter.grad)
        whole |= {name: x for name, x in replaced.state_dict().items() if name not in whole}
    return Step(rows, loss.detach(), {name: whole[name] for name in names})
