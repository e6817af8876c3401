"""Small tensors of the host on a device, for which nobody waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(x: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Integers, or a tensor of the host, on a device. A copy to a GPU is only queued.

    From memory that may be paged out CUDA copies at once, after all that it has been given to do before.
    """
    x = x if isinstance(x, Tensor) else torch.tensor(x)
    if device.type != "cuda" or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
