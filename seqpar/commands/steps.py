"""The steps that `seqpar bench` takes the time of, measures and checks: one call in a process."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seqpar import Group, Mask, Plan, attention
from seqpar.calls import Shape, dry_run, resolve
from seqpar.commands.peers import PEERS, Attend, one_device
from seqpar.layout import LAYOUTS
from seqpar.strategies import STRATEGIES
from seqpar.testing import NAMES, PeakMemory, meet

Results = tuple[Tensor, ...]  # out, and with a backward dq, dk, dv


@dataclass(frozen=True)
class Setting:
    """What is attended, and by contender in which layout.

    Args:
        backward: whether gradients are computed too.
    """

    length: int
    heads: int
    d: int
    dtype: torch.dtype
    causal: bool
    backward: bool
    layouts: dict[str, str]


@dataclass(frozen=True)
class Taken:
    """How long a step took on a rank, and what it sent: counted, and by a dry run; unknown of a peer."""

    seconds: float
    sent_bytes: int | None = None
    derived_bytes: int | None = None


def one_device_step(_: Group, setting: Setting) -> float:
    """Seconds of a step on the whole sequence, with torch's own attention and tensors as it likes them."""
    heads_first = tuple(x.transpose(1, 2).contiguous() for x in _tensors(setting))
    attend = partial(F.scaled_dot_product_attention, is_causal=setting.causal)
    return _timed(attend, heads_first, setting)[1]


def rank_step(group: Group, setting: Setting, name: str) -> Taken:
    """A step on this rank's rows. The clock starts once all ranks are there."""
    tensors = q, k, v, _ = _random(setting, len(_rows(group, setting, name)))
    attend = _attend(group, setting, name)
    meet(group)
    group.traffic.reset()
    _, seconds = _timed(attend, tensors, setting)
    if name in PEERS:
        return Taken(seconds)
    sent = group.traffic.total.bytes
    plan = resolve(_plan(group, setting, name), q, v)
    derived = dry_run.sent(plan, Shape.of(q, k, v), group.rank)
    backward = derived.backward.bytes if setting.backward else 0
    return Taken(seconds, sent, derived.forward.bytes + backward)


def save_expected(_: Group, setting: Setting, path: Path) -> None:
    """Writes what one device computes in float32 from the same tensors."""
    wide = tuple(x.float() for x in _tensors(setting))
    results = _timed(partial(one_device.attend, causal=setting.causal), wide, setting)[0]
    _expected(path, setting, shared=True).copy_(torch.stack(results))


def rank_errors(group: Group, setting: Setting, name: str, path: Path) -> dict[str, float]:
    """By result, how far this rank's rows are from what one device computed, as a share of its norm."""
    rows = _rows(group, setting, name)
    tensors = tuple(x[:, rows] for x in _tensors(setting))
    results, _ = _timed(_attend(group, setting, name), tensors, setting)
    found = {}
    for what, x, whole in zip(NAMES, results, _expected(path, setting), strict=False):
        right = whole[:, rows]
        error = float((x.float() - right).norm() / right.norm()) if len(rows) else 0.0
        # Of a NaN no maximum can be taken, and nothing is worse.
        found[what] = math.inf if math.isnan(error) else error
    return found


def _expected(path: Path, setting: Setting, *, shared: bool = False) -> Tensor:
    """out, and with a backward dq, dk, dv, in float32 in a file; to be written where it is shared."""
    shape = 4 if setting.backward else 1, 1, setting.length, setting.heads, setting.d
    return torch.from_file(str(path), shared, math.prod(shape)).view(shape)


def one_device_memory(group: Group, setting: Setting) -> int | None:
    """Peak growth in bytes of one process that attends the whole sequence."""
    one_device_step(group, replace(setting, length=16))
    return _peak(lambda: one_device_step(group, setting))


def rank_memory(group: Group, setting: Setting, name: str) -> int | None:
    """Peak growth in bytes over one step, the rank's own q, k, v, dout and gradients included."""
    small = replace(setting, length=8 * group.size)
    rank_step(group, small, name)  # threads, buffers of gloo
    return _peak(lambda: rank_step(group, setting, name))


def _attend(group: Group, setting: Setting, name: str) -> Attend:
    if name in PEERS:
        return PEERS[name].make(setting.causal)
    return partial(attention, plan=_plan(group, setting, name))


def _timed(attend: Attend, tensors: Results, setting: Setting) -> tuple[Results, float]:
    """(results, seconds) of one step."""
    q, k, v, dout = tensors
    if not setting.backward:
        start = time.perf_counter()
        with torch.no_grad():
            out = attend(q, k, v)
        return (out,), time.perf_counter() - start
    leaves = q, k, v = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    start = time.perf_counter()
    out = attend(q, k, v)
    gradients = torch.autograd.grad(out, leaves, dout)
    seconds = time.perf_counter() - start
    return (out.detach(), *gradients), seconds


def _peak(step: Callable[[], object]) -> int | None:
    """Its peak growth in bytes, `None` where that cannot be read."""
    if sys.platform != "linux":
        step()  # the other ranks wait for it
        return None
    with PeakMemory() as peak:
        step()
    return peak.bytes


def _plan(group: Group, setting: Setting, strategy: str) -> Plan:
    grid = None
    if STRATEGIES[strategy].needs_grid:  # as square as can be
        divisors = [n for n in range(1, group.size + 1) if group.size % n == 0]
        grid = group.grid(ulysses=divisors[(len(divisors) - 1) // 2])
    layout = LAYOUTS[setting.layouts[strategy]](setting.length, group.size)
    return Plan(group, layout, Mask(causal=setting.causal), strategy=strategy, grid=grid)


def _rows(group: Group, setting: Setting, name: str) -> Tensor:
    """The positions of this rank's rows."""
    return LAYOUTS[setting.layouts[name]](setting.length, group.size).positions(group.rank)


def _tensors(setting: Setting) -> Results:
    """q, k, v, dout of the whole sequence, the same in every process."""
    # A generator of its own: ranks that are threads would draw from the same one in turns.
    return _random(setting, setting.length, torch.Generator().manual_seed(0))


def _random(setting: Setting, rows: int, generator: torch.Generator | None = None) -> Results:
    """q, k, v, dout of so many rows."""
    shape = 1, rows, setting.heads, setting.d
    return tuple(torch.randn(shape, dtype=setting.dtype, generator=generator) for _ in range(4))
