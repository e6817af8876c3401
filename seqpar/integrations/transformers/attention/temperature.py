"""Queries that a layer has scaled by their positions, which it took for those of a whole sequence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqpar.strategies import Plan
from seqpar_kernels.transfer import on_device


def tempered(
    module: nn.Module, q: Float[Tensor, "b sl hq d"], plan: Plan
) -> Float[Tensor, "b sl hq d"]:
    """The queries of Llama 4's layers without rotary embeddings, scaled by their positions in the sequence.

    Such a layer counts its rows from 0, whatever positions it is given. Source: Nakanishi 2025
    (arXiv:2501.19399).
    """
    if not _is_tempered(module):
        return q
    whole = on_device(plan.layout.positions(plan.group.rank), q.device)
    by = _temperature(module, whole) / _temperature(module, _counted(q))
    return (q * by[:, None, None]).to(q.dtype)


def untempered(module: nn.Module, q: Float[Tensor, "b sl hq d"]) -> Float[Tensor, "b sl hq d"]:
    """The queries as they were before such a layer scaled them."""
    if not _is_tempered(module):
        return q
    return (q / _temperature(module, _counted(q))[:, None, None]).to(q.dtype)


def _is_tempered(module: nn.Module) -> bool:
    tunes = bool(getattr(module, "attn_temperature_tuning", False))
    return tunes and not getattr(module, "use_rope", True)


def _counted(q: Tensor) -> Tensor:
    """The positions that the layer took its rows for."""
    return torch.arange(q.shape[1], device=q.device)


def _temperature(module: nn.Module, positions: Tensor) -> Float[Tensor, "sl"]:
    # In float32, as the layer has it; what is made of it is not.
    steps = torch.floor((positions.float() + 1.0) / module.floor_scale)  # type: ignore[operator]
    return (torch.log1p(steps) * module.attn_scale + 1.0).double()  # type: ignore[operator]
