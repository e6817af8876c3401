"""A step of a model that is sharded whole: heads, MLPs and vocabulary over tp, sequences over sp."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import seqpar
from hf.step import Step, attend_by
from seqpar.integrations.transformers import SequenceParallel
from seqpar.tensor_parallel import apply_policy, megatron, replace_attention, whole_state


def sharded_step(
    mesh: DeviceMesh,
    model: Any,
    batch: Mapping[str, Any],
    strategy: str = "ring",
    *,
    replaces: bool = True,
) -> Step:
    """The step of a copy of the model on this rank of a mesh sp x tp, with gradients of whole weights.

    Args:
        replaces: whether attention is replaced; if not, the policy cuts it with torch's styles.
    """
    names = [name for name, _ in model.named_parameters()]
    model = copy.deepcopy(model)
    sp_group, tp_group = seqpar.Group.of(mesh["sp"]), seqpar.Group.of(mesh["tp"])
    replaced = replace_attention(model, tp=tp_group) if replaces else None
    apply_policy(model, megatron(model), mesh["tp"])
    sp = SequenceParallel(model, attend_by(strategy, sp_group))
    kept: list[tuple[seqpar.Layout, Tensor]] = []

    def note(_: Any, __: Any, given: dict[str, Any], output: Any) -> None:
        kept.append((given["seqpar"].plan.layout, output.logits.detach()))

    model.register_forward_hook(note, with_kwargs=True)
    loss = sp.loss(batch)
    loss.backward()
    seqpar.sum_gradients(model.parameters(), sp_group)
    layout, logits = kept[0]
    logits = seqpar.unshard_sequence(logits, layout, sp_group)
    whole = whole_state(model, gradients=True)
    if replaced is not None:
        with torch.no_grad():
            for stand_in in replaced.stand_ins:
                for parameter in stand_in.parameters():
                    assert parameter.grad is not None
                    parameter.copy_(parameter.grad)
        whole |= {name: x for name, x in replaced.state_dict().items() if name not in whole}
    return Step(logits, loss.detach(), {name: whole[name] for name in names})
