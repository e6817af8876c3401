"""`start`: the group and the device of a process, with or without torchrun, on CPUs or GPUs."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from seqpar import Group


def start() -> tuple[Group, torch.device]:
    """(the processes that torchrun started, or this one alone; the device of this one).

    The caller ends with `torch.distributed.destroy_process_group()`, if it is initialised.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Group.alone(), device
    if device.type == "cuda":
        # NCCL for tensors; gloo for what ranks compare, which would else wait for the device.
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    return Group.of(), device
