"""The steps that `seqpar bench` takes the time of and measures: one forward and backward in a process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from seqpar import Group, Mask, Plan
from seqpar.calls import Volume
from seqpar.layout import LAYOUTS, Layout
from seqpar.strategies import STRATEGIES
from seqpar.testing import PeakMemory, run_step


@dataclass(frozen=True)
class Setting:
    """What is attended, and by strategy in which layout."""

    length: int
    heads: int
    d: int
    dtype: torch.dtype
    causal: bool
    layouts: dict[str, str]


def one_device_step(_: Group, setting: Setting) -> float:
    """Seconds of forward and backward on the whole sequence, with torch's own attention."""
    shape = 1, setting.heads, setting.length, setting.d
    q, k, v, dout = (torch.randn(shape, dtype=setting.dtype) for _ in range(4))
    leaves = q, k, v = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    start = time.perf_counter()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=setting.causal)
    torch.autograd.grad(out, leaves, dout)
    return time.perf_counter() - start


def rank_step(group: Group, setting: Setting, strategy: str) -> tuple[float, Volume, Volume]:
    """Seconds of forward and backward on this rank, what it sent, and what a dry run says."""
    plan = _plan(group, setting, strategy)
    q, k, v, dout = _rank_tensors(plan.layout, group.rank, setting)
    step = run_step(q, k, v, dout, plan)
    return step.seconds, step.sent, step.derived


def one_device_memory(group: Group, setting: Setting) -> int | None:
    """Peak growth in bytes of one process that attends the whole sequence."""
    one_device_step(group, replace(setting, length=16))
    return _peak(lambda: one_device_step(group, setting))


def rank_memory(group: Group, setting: Setting, strategy: str) -> int | None:
    """Peak growth in bytes over one step, the rank's own q, k, v, dout and gradients included."""
    small = replace(setting, length=8 * group.size)
    rank_step(group, small, strategy)  # threads, buffers of gloo
    return _peak(lambda: rank_step(group, setting, strategy))


def _peak(step: Callable[[], object]) -> int | None:
    """Its peak growth in bytes, `None` where that cannot be read."""
    if sys.platform != "linux":
        step()  # the other ranks wait for it
        return None
    with PeakMemory() as peak:
        step()
    return peak.bytes


def _plan(group: Group, setting: Setting, strategy: str) -> Plan:
    layout = LAYOUTS[setting.layouts[strategy]](setting.length, group.size)
    grid = None
    if STRATEGIES[strategy].needs_grid:  # as square as can be
        divisors = [n for n in range(1, group.size + 1) if group.size % n == 0]
        grid = group.grid(ulysses=divisors[(len(divisors) - 1) // 2])
    return Plan(group, layout, Mask(causal=setting.causal), strategy=strategy, grid=grid)


def _rank_tensors(layout: Layout, rank: int, setting: Setting) -> tuple[Tensor, ...]:
    """q, k, v, dout of this rank's rows."""
    shape = 1, layout.rows[rank], setting.heads, setting.d
    return tuple(torch.randn(shape, dtype=setting.dtype) for _ in range(4))
