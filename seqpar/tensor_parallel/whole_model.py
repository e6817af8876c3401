"""Whole weights of a model that a policy has cut: gathered to be saved, cut again where they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.comm import Group, agreed
from seqpar.tensor_parallel.check_state import check_state
from seqpar.tensor_parallel.cut import CutRecord, deal_halves, undeal_halves
from seqpar.tensor_parallel.policy import weight_paths


def whole_state(model: nn.Module, *, gradients: bool = False) -> dict[str, Tensor]:
    """The weights outside of tensor-parallel attention as one device holds them, gathered. All ranks call.

    To save and to compare with: halves that "paired output" has cut are in another order in the model itself.
    Weights of attention that cut its own are left out, see `ParallelAttention.whole_state`.

    Args:
        gradients: the gradients instead; weights without one are left out.
    """
    from seqpar.tensor_parallel.styles import reshard_weights, whole_tensor

    reshard_weights(model)
    state = {}
    for path in weight_paths(model):
        parameter = model.get_parameter(path)
        x = parameter.grad if gradients else parameter.detach()
        if x is None:
            continue
        module = model.get_submodule(path.rpartition(".")[0])
        whole, dealt = whole_tensor(x), CutRecord.of(module).num_dealt
        state[path] = whole if dealt is None else undeal_halves(whole, dealt)
    return state


def load_whole_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The inverse of `whole_state`: each rank takes its part of whole weights, which every rank gives.

    Raises:
        ValueError: a weight is missing, unexpected, or of another shape. Nothing is written then.
        DesyncError: another rank raised one of the above.
    """
    from seqpar.tensor_parallel.styles import reshard_weights

    reshard_weights(model)
    paths = list(weight_paths(model))
    parameters: list[Any] = [model.get_parameter(path) for path in paths]
    meshes = [p.device_mesh for p in parameters if hasattr(p, "full_tensor")]
    largest: Any = max(meshes, key=lambda mesh: mesh.ndim, default=None)
    axes = [Group.of(ranks) for ranks in largest.get_all_groups()] if meshes else []
    with agreed(*axes, operation="load_whole_state"):
        shapes = (tuple(p.shape) for p in parameters)
        check_state(state, dict(zip(paths, shapes, strict=True)))
    write_whole(model, state)


@torch.no_grad()
def write_whole(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Writes whole weights, of the right shapes, into the parameters of those paths. Sends nothing."""
    from seqpar.tensor_parallel.styles import cut_alike

    for path, whole in state.items():
        parameter = model.get_parameter(path)
        dealt = CutRecord.of(model.get_submodule(path.rpartition(".")[0])).num_dealt
        whole = whole if dealt is None else deal_halves(whole, dealt)
        parameter.copy_(cut_alike(whole.to(parameter.device, parameter.dtype), parameter))
