"""DeepSpeed's Ulysses: its `DistributedAttention` around torch's attention."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import torch.distributed as dist

from seqpar.commands.peers.one_device import Attend, attend


def ulysses(causal: bool) -> Attend:
    """Attention of all ranks of this process. Prints what DeepSpeed prints."""
    comm = import_module("deepspeed.comm")
    if not comm.is_initialized():
        comm.init_distributed(dist_backend="gloo", verbose=False)
    local = partial(attend, causal=causal)
    layer = import_module("deepspeed.sequence.layer").DistributedAttention(
        local, dist.group.WORLD, scatter_idx=2, gather_idx=1
    )
    return lambda q, k, v: layer(q, k, v, 0)
