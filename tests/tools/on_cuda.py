"""`OnCuda`: tensors of the CPU that say they are on a GPU, and tell who would wait for it.

With it, what a program does on a GPU besides computing can be tested where there is none: which branches it
takes, what it copies, and that the host never waits until the device is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakIdKeyDictionary

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Whoever asks for these is told when the device has done all that it was given.
READS = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "nonzero", "argwhere", "is_nonzero", "equal", "allclose", "masked_select", "unique",
    "unique_consecutive", "bincount", "histc", "__array__",
}  # fmt: skip


class WaitError(AssertionError):
    """The host would wait for the device."""


class OnCuda(TorchFunctionMode):
    """All tensors are on a GPU, but for those made on the host inside of this mode.

    What is copied to the device must be pinned, and the copy only queued; nothing is copied back. In backward
    the mode must be on, which `torch.autograd.grad` takes off: see `backward`.

    Raises:
        WaitError: whatever would wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._host, self._pinned = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def is_host(self, x: Tensor) -> bool:
        """Whether a tensor is one of the host."""
        return x.untyped_storage() in self._host

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return CPU if self.is_host(args[0]) else CUDA
        if func == Tensor.is_cuda.__get__:
            return not self.is_host(args[0])
        assert "seqpar" not in str(func), "inside of an op of Python nothing would be seen"
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_host = all(map(self.is_host, given))
        if name == "pin_memory":
            result = args[0].clone()
            self._host[result.untyped_storage()] = self._pinned[result.untyped_storage()] = True
            return result
        if not on_host:
            self._check(name, args)
        device = kwargs.pop("device", None) or next(
            (x for x in args if isinstance(x, torch.device)), None
        )
        device = None if device is None else torch.device(device)
        args = tuple(CPU if isinstance(x, torch.device) else x for x in args)
        if device is not None and device.type == "cuda" and on_host:
            self._check_copy(name, given, kwargs)
            return func(*args, **kwargs).clone()
        if device is not None and device.type == "cpu" and not on_host:
            raise WaitError(f"{name} copies from the device")
        result = func(*args, **kwargs)
        if on_host and (given or device is None or device.type == "cpu"):
            for x in tree_flatten(result)[0]:
                if isinstance(x, Tensor):
                    self._host[x.untyped_storage()] = True
        elif name == "copy_" and not self.is_host(args[0]) and self.is_host(args[1]):
            self._check_copy(name, [args[1]], kwargs)
        return result

    def _check(self, name: str, args: tuple[Any, ...]) -> None:
        indices = args[1] if name in ("__getitem__", "__setitem__") else ()
        if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_flatten(indices)[0]):
            raise WaitError("an index of booleans counts them")
        counts = name == "repeat_interleave" and isinstance(args[-1], Tensor)
        if name in READS or counts or (name == "where" and len(args) == 1):
            raise WaitError(f"{name} reads from the device")

    def _check_copy(self, name: str, given: Sequence[Tensor], kwargs: dict[str, Any]) -> None:
        if name == "tensor" or any(x.numel() for x in given):
            pinned = given and all(x.untyped_storage() in self._pinned for x in given)
            if not (pinned and kwargs.get("non_blocking")):
                raise WaitError(f"{name} copies to the device from memory that may be paged out")


def backward(
    ends: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of leaves. What torch documents takes modes off first."""
    return torch.autograd.graph._engine_run_backward(
        tuple(ends), tuple(grads), False, False, tuple(leaves), allow_unreachable=True, accumulate_grad=False
    )  # fmt: skip
