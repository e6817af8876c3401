"""`clip_gradients`: the norm of a gradient whose parts are on several ranks, each part counted once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.comm import Group, agreed, all_reduce_
from seqpar.tensor_parallel.layer import ParallelAttention


def clip_gradients(model: nn.Module, tp: Group, max_norm: float = math.inf) -> float:
    """The 2-norm of the whole gradient; where it exceeds `max_norm`, gradients are scaled down, in place.

    The same number on every rank, and that of one device: what ranks share is added, copies of kv heads and
    weights that every rank holds count once. To be called when gradients are complete, after
    `seqpar.sum_gradients`. All ranks of tp must call.

    Args:
        model: with `ParallelAttention` layers, and weights that a policy has placed over tp.
        tp: the ranks that share the heads.

    Raises:
        ValueError: max_norm is not positive.
        NotImplementedError: a gradient is sharded over other ranks, too, as by FSDP.
        DesyncError: another rank raised one of the above.
    """
    with agreed(tp, operation="clip_gradients") as claim:
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        claim["max_norm"] = max_norm
        parts = list(_parts(model, tp))
        claim["parts"] = len(parts)
    device = parts[0].device if parts else torch.device("cpu")
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for part in parts:
        squares += part.to(torch.float64).square().sum()
    all_reduce_(squares, tp)
    norm = math.sqrt(squares.item())
    if norm > max_norm:  # nan is not, and stays
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(max_norm / norm)
    return norm


def _parts(model: nn.Module, tp: Group) -> Iterator[Tensor]:
    """This rank's parts of all gradients, empty where another rank counts them."""
    seen: set[int] = set()  # a head that is the embedding counts once
    for module in model.modules():
        is_shared = isinstance(module, ParallelAttention) and module.tp.size == tp.size
        shared = _parts_of_layer(module) if is_shared else {}
        for p in module.parameters(recurse=False):
            if p.grad is not None and id(p) not in seen:
                seen.add(id(p))
                yield shared[id(p)] if id(p) in shared else _own_part(p, tp)


def _parts_of_layer(layer: Any) -> dict[int, Tensor]:
    """Finds the rows of a layer's gradients that are this rank's to count, by parameter."""
    parts: dict[int, Tensor] = {}
    dealt, rank, d = layer.dealt, layer.tp.rank, layer.qkv.head_dim
    before = dealt.kv[rank - 1][1] if rank else 0  # ranges ascend: the first holder counts a head
    copies = max(0, before - dealt.kv[rank][0]) * d
    for p in (layer.qkv_weight, layer.qkv_bias):
        if p is not None and p.grad is not None:
            q, k, v = p.grad.split(layer.qkv.sizes(dealt, rank))
            parts[id(p)] = torch.cat([q, k[copies:], v[copies:]])
    if layer.out_weight.grad is not None:
        parts[id(layer.out_weight)] = layer.out_weight.grad
    return parts


def _own_part(p: Any, tp: Group) -> Tensor:
    """Gives what this rank counts of a parameter that is no layer's: a shard, or all on the first rank."""
    grad = p.grad
    if not hasattr(grad, "full_tensor"):
        whole: Tensor = grad
        return whole if tp.rank == 0 else whole.flatten()[:0]
    if grad.device_mesh.mesh.flatten().tolist() != list(tp.transport.global_ranks):
        raise NotImplementedError(
            f"a gradient {tuple(grad.shape)} is sharded over {grad.device_mesh}, not over the ranks of tp "
            "alone; torch.nn.utils.clip_grad_norm_ serves gradients that are all on one mesh, for others "
            "whole_state(model, gradients=True) gives the whole ones, whose norm may be taken"
        )
    (placement,) = p.placements
    if grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    shard: Tensor = grad.to_local()
    return shard if placement.is_shard() or tp.rank == 0 else shard.flatten()[:0]
