"""yunchang (USP): its `UlyssesAttention` around torch's attention."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch.distributed as dist
from torch import Tensor

from seqpar.commands.peers.one_device import Attend, attend


def ulysses(causal: bool) -> Attend:
    """Attention of all ranks of this process."""
    kernels = import_module("yunchang.kernels")
    layer = import_module("yunchang.ulysses").UlyssesAttention(
        dist.group.WORLD, attn_type=kernels.AttnType.TORCH_EFFICIENT
    )
    layer.attn_fn = _local  # its own calls ops that only CUDA has
    return lambda q, k, v: layer(q, k, v, causal=causal)


def _local(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **_: Any) -> Tensor:
    return attend(q, k, v, causal=causal)
