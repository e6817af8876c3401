"""`same_weights`: ranks that train one model begin with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqpar.comm import Group, agreed

WORDS = 2**21  # eight bytes each: what is summed at a time


def same_weights(module: nn.Module, group: Group, *, broadcast: bool = False) -> None:
    """Refuses parameters that ranks should share and do not, to the bit. All ranks must call.

    Shards (DTensors, flat parameters of FSDP) are left out: those of other ranks are meant to differ.

    Args:
        broadcast: gives every rank the parameters of rank 0 instead, in place.

    Raises:
        ValueError: a parameter has no content yet.
        DesyncError: ranks have other parameters, the first of which are named.
    """
    with agreed(group, operation="same_weights") as claim:
        shared = _shared(module)
        claim |= {name: (tuple(p.shape), p.dtype) for name, p in shared.items()}
        claim["broadcast"] = broadcast
    if broadcast:
        for p in shared.values():
            _broadcast(p, group)
        return
    with agreed(group, operation="same_weights") as claim:
        for name, p in shared.items() if group.size > 1 else ():
            claim[f"the hash of {name}"] = content_hash(p)


def _shared(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that every rank holds whole."""
    flat = [m for m in module.modules() if type(m).__name__ == "FullyShardedDataParallel"]
    cut = {id(p) for m in flat for p in m.parameters()}
    whole: dict[str, Tensor] = {
        name: p
        for name, p in module.named_parameters()
        if type(p.data) is Tensor and id(p) not in cut
    }
    for name, p in whole.items():
        if p.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: compare weights when they are loaded")
    return whole


@torch.no_grad()
def content_hash(x: Tensor) -> str:
    """What a tensor holds, in short: a sum of its words, each times an odd number that tells its place."""
    raw = x.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() % 8:  # else it would be copied
        raw = F.pad(raw, (0, -raw.numel() % 8))
    words = raw.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for n, part in enumerate(words.split(WORDS)):
        places = torch.arange(n * WORDS, n * WORDS + len(part), device=x.device)
        total += (part * (2 * places + 1)).sum()
    return f"{int(total) % 2**64:016x}"


@torch.no_grad()
def _broadcast(p: Tensor, group: Group) -> None:
    mine = p.detach().contiguous()
    if group.rank == 0:
        group.exchange("broadcast", [(r, mine) for r in group.others], []).wait()
        return
    theirs = torch.empty_like(mine)
    group.exchange("broadcast", [], [(0, theirs)]).wait()
    p.copy_(theirs)
