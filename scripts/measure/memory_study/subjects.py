"""What is measured: a step of every strategy and of one device, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from seqpar import Group, Mask, Plan, attention
from seqpar.layout import LAYOUTS
from seqpar.testing import PeakMemory, ProcessWorld
from seqpar.testing.memory import give_back_freed

MIB = 2**20
STRATEGIES = {"ring": "zigzag", "ulysses": "contiguous"}  # strategy -> the layout it likes best
STORED, NOT_STORED = "one device, scores stored", "one device, scores not stored"
WARM_UP_ROWS = 8  # of a rank


@dataclass(frozen=True)
class Setting:
    """The tensors of a step: few heads, because memory is studied and not speed.

    Args:
        mmap_threshold_bytes: allocations from this size on are mappings of their own; 0 leaves that
            to glibc, which raises its threshold whenever a mapping is freed.
    """

    heads: int = 4
    d: int = 32
    dtype: str = "float32"
    mmap_threshold_bytes: int = 64 * 2**10


def attention_with_stored_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention on `[b h s d]` whose softmax of all scores waits for backward."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu_(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return scores.masked_fill_(hidden, float("-inf")).softmax(-1) @ v


ONE_DEVICE: dict[str, Callable[..., Tensor]] = {
    NOT_STORED: partial(F.scaled_dot_product_attention, is_causal=True),
    STORED: attention_with_stored_scores,
}


def stored_bytes(length: int, setting: Setting) -> int:
    """About what stored scores need: three copies in the backward of softmax, and the mask."""
    item = torch.empty(0, dtype=getattr(torch, setting.dtype)).element_size()
    return length**2 * (3 * setting.heads * item + 1)


def step(group: Group, subject: str, length: int, setting: Setting) -> None:
    """Forward and backward of a subject on this rank's rows of random tensors."""
    attend: Callable[..., Tensor]
    if subject in STRATEGIES:
        layout = LAYOUTS[STRATEGIES[subject]](length, group.size)
        plan = Plan(group, layout, Mask(causal=True), strategy=subject)  # type: ignore[arg-type]
        attend = partial(attention, plan=plan)
        shape = 1, layout.rows[group.rank], setting.heads, setting.d
    else:
        attend, shape = ONE_DEVICE[subject], (1, setting.heads, length, setting.d)
    dtype = getattr(torch, setting.dtype)
    q, k, v, dout = (torch.randn(shape, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(attend(*leaves), leaves, dout)


def step_bytes(group: Group, subject: str, length: int, setting: Setting) -> int:
    """Peak growth of this process in bytes over one step."""
    if setting.mmap_threshold_bytes:
        give_back_freed(setting.mmap_threshold_bytes)
    step(group, subject, WARM_UP_ROWS * group.size, setting)
    with PeakMemory() as peak:
        step(group, subject, length, setting)
    return peak.bytes


def measure(subject: str, length: int, ranks: int, setting: Setting) -> int:
    """Peak bytes of the rank that needs most, in fresh processes."""
    with ProcessWorld(ranks) as world:
        return max(world.run(step_bytes, subject, length, setting, timeout=600.0))
