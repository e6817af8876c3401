"""Copies of kv heads that have drifted apart by rounding get the same bits again."""

from __future__ import annotations

import torch
from torch import nn

from seqpar.comm import all_gather
from seqpar.tensor_parallel.layer import ParallelAttention


@torch.no_grad()
def settle_copies(model: nn.Module, *, tolerance: float = 1e-3) -> float:
    """Gives every copy of a kv head the bits of the first rank that holds it; how far apart they were.

    Gradients of copies are the same bits after backward. What sums them over replicas may add in other orders
    on each of its groups (NCCL promises none), and copies then drift by rounding, over many steps. Before
    whole weights are taken, which refuses copies that differ. All ranks of tp must call.

    Args:
        tolerance: how far apart a copy may be, relative to the largest weight of its layer.

    Returns:
        The largest such difference.

    Raises:
        ValueError: copies are further apart than rounding explains: they were trained apart. No copy of that
            layer is changed. On every rank of tp.
    """
    farthest = 0.0
    for name, layer in model.named_modules():
        if isinstance(layer, ParallelAttention) and layer.dealt.replicates:
            farthest = max(farthest, _settle(layer, name, tolerance))
    return farthest


def _settle(layer: ParallelAttention, name: str, tolerance: float) -> float:
    tp = layer.tp
    rows = [sum(layer.qkv.sizes(layer.dealt, r)) for r in range(tp.size)]
    settled = []
    for parameter in (layer.qkv_weight, layer.qkv_bias):
        if parameter is not None:
            mine = parameter.detach()
            shards = all_gather(mine, tp, rows, 0).split(rows)
            settled.append((parameter, layer.qkv.first_copies(shards, tp.rank)))
    scale = max(p.abs().max() for p, _ in settled)
    here = max((p - x).abs().max() for p, x in settled) / scale.clamp(min=1e-30)
    farthest = here.double().nan_to_num(torch.inf).reshape(1)
    tp.all_reduce_(farthest, "max")
    apart = float(farthest)
    if apart > tolerance:
        raise ValueError(
            f"copies of kv heads of {name or 'the layer'} are {apart:.2g} apart, relative to its largest "
            f"weight, more than {tolerance}: they were trained apart, without the sum of their gradients"
        )
    for parameter, x in settled:
        parameter.copy_(x)
    return apart
