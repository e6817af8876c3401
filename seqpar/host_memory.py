"""`saved_on_host`: what forward saves for backward waits in the memory of the host, not of the device.

Of checkpointed blocks that is their inputs, and what `seqpar.keep_attention` keeps. Copies leave and come
back on streams of their own, beside the one that computes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from seqpar_kernels.torch_internals import version, viewed

LEAST_BYTES = 2**20
_CURRENT: ContextVar[HostMemory | None] = ContextVar("host_memory", default=None)


@contextmanager
def saved_on_host(*, ahead: int = 2, least_bytes: int = LEAST_BYTES) -> Iterator[HostMemory]:
    """A block of forwards in which tensors that are saved for backward move to the host.

    Put the checkpointed blocks of a model in it. Of each its input moves, and what `seqpar.keep_attention`
    keeps. Backward may come after it, and brings them back. The host never waits for the device; its memory
    is pinned. On a CPU tensors are copied all the same, which saves nothing.

    Moved are floating tensors of `least_bytes` or more that are not parameters, nor leaves that want
    gradients: who made those holds them anyway. DTensors stay, and so do arguments that a block gets by
    keyword or in a tuple, since torch does not save those.

    Args:
        ahead: how many tensors begin to come back before backward asks for them, last ones first. Of a block
            with ring attention that is kept two are large: its input, and what attention gave.
        least_bytes: smaller tensors stay.

    Raises:
        ValueError: ahead is negative.
        RuntimeError: a tensor was written to in place while it was copied.
    """
    if ahead < 0:
        raise ValueError(f"ahead must not be negative, got {ahead}")
    memory = HostMemory(ahead, least_bytes)
    token = _CURRENT.set(memory)
    try:
        with saved_tensors_hooks(memory.pack, memory.unpack):
            yield memory
    finally:
        _CURRENT.reset(token)
        memory.settle()


def current_host_memory() -> HostMemory | None:
    """That of the innermost `saved_on_host` of this thread."""
    return _CURRENT.get()


class HostMemory:
    """Tensors of one block of forwards, moved. `bytes` of them have left so far."""

    def __init__(self, ahead: int, least_bytes: int) -> None:
        self.bytes = 0
        self._ahead, self._least_bytes = ahead, least_bytes
        self._lanes: dict[torch.device, _Lane] = {}
        self._order: list[weakref.ref[_Moved]] = []
        self._by_tensor = WeakIdKeyDictionary()  # what several blocks are given is moved once

    def pack(self, x: Tensor) -> Tensor | _Moved:
        """What stands for a tensor until backward: itself, if it stays."""
        if not self._moves(x):
            return x
        reference, before = self._by_tensor.get(x, (None, None))
        known = reference() if reference is not None and before == version(x) else None
        if known is not None:
            return known
        lane = self._lanes.get(x.device)
        if lane is None:
            lane = self._lanes[x.device] = _Lane(x.device)
        moved = _Moved(lane, x, self._order[-self._ahead :] if self._ahead else [])
        self._by_tensor[x] = weakref.ref(moved), version(x)
        self._order.append(weakref.ref(moved))
        self.bytes += x.numel() * x.element_size()
        return moved

    def unpack(self, packed: Tensor | _Moved) -> Tensor:
        """The tensor again."""
        return packed.value() if isinstance(packed, _Moved) else packed

    def settle(self) -> None:
        """Lets go of tensors whose copies are under way."""
        for lane in self._lanes.values():
            lane.let_go(0)

    def _moves(self, x: Tensor) -> bool:
        of = viewed(x)
        is_held = isinstance(of, nn.Parameter) or (of.is_leaf and of.requires_grad)
        is_plain = type(x) is Tensor and x.device.type != "meta" and x.is_floating_point()
        return is_plain and not is_held and x.numel() * x.element_size() >= self._least_bytes


class _Moved:
    """A tensor in the memory of the host.

    Args:
        before: those that left before it, which backward is likely to ask for next.
    """

    def __init__(self, lane: _Lane, x: Tensor, before: list[weakref.ref[_Moved]]) -> None:
        self._coming: tuple[Tensor, Any] | None = None
        self._lane, self._before = lane, before
        self._host, self._left = lane.leave(x)
        self._was_asked_for = False

    def begin(self) -> None:
        """Begins to bring it back, unless it has been back before."""
        if self._coming is None and not self._was_asked_for:
            self._coming = self._lane.come_back(self._host, self._left)

    def value(self) -> Tensor:
        """The tensor on its device, for what is computed from now on; and begins with those before it."""
        x, arrived = self._coming or self._lane.come_back(self._host, self._left)
        self._coming, self._was_asked_for = None, True
        self._lane.computing.wait_event(arrived)
        for reference in reversed(self._before):
            if moved := reference():
                moved.begin()
        return x

    def __del__(self) -> None:
        # Nobody asked, and its memory goes back to the stream that computes while it may still be written.
        if self._coming is not None:
            self._lane.computing.wait_event(self._coming[1])


class _Lane:
    """The ways between one device and the host. Events order streams; the host waits for none of them."""

    MOST_LEAVING = 1

    def __init__(self, device: torch.device) -> None:
        self.device, self._module = device, torch.get_device_module(device)
        self._is_host = (
            device.type == "cpu"
        )  # then streams are torch's stand-ins, and copies are done at once
        self._out, self._back = (
            self._module.Stream() if self._is_host else self._module.Stream(device)
            for _ in range(2)
        )
        self._leaving: deque[tuple[Tensor, int, Any]] = deque()

    @property
    def computing(self) -> Any:
        """The stream that computes on this thread."""
        return self._module.current_stream(self.device)

    def leave(self, x: Tensor) -> tuple[Tensor, Any]:
        """(its copy on the host, the event after which it is there)."""
        # docs/design.md: tensors leave one at a time
        self.let_go(self.MOST_LEAVING - 1)
        x = x.detach()
        host = torch.empty_like(x, device="cpu", pin_memory=not self._is_host)
        self._out.wait_stream(self.computing)
        with self._module.stream(self._out):
            host.copy_(x, non_blocking=True)
        left = self._out.record_event()
        self._leaving.append((x, version(x), left))
        return host, left

    def let_go(self, most: int) -> None:
        """Drops tensors that leave, the oldest first, after their copies for the stream that computes."""
        while len(self._leaving) > most:
            x, before, left = self._leaving.popleft()
            self.computing.wait_event(left)
            if version(x) != before:
                raise RuntimeError(
                    f"a tensor {tuple(x.shape)} that is saved for backward was written to in place while it "
                    "was copied to the host; use an out-of-place operation"
                )

    def come_back(self, host: Tensor, left: Any) -> tuple[Tensor, Any]:
        """(the copy on the device, the event after which it is there)."""
        x = torch.empty_like(host, device=self.device)
        self._back.wait_stream(self.computing)  # until then its memory may be another's
        self._back.wait_event(left)
        with self._module.stream(self._back):
            x.copy_(host, non_blocking=True)
        return x, self._back.record_event()
