"""`Width`: rows of which every rank holds a part of each, so that code of one device norms whole rows.

A norm written with tensors, as the RMS norms of models are, then adds up one number a row over the ranks,
where DTensor's backward would scatter the rows themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from seqpar.comm import Group, all_reduce, replicate
from seqpar_kernels.torch_internals import without_subclass

_T = torch.Tensor

# What acts on each element alone, or reads a property. Anything else might be right on one device only.
_ELEMENTWISE = {
    _T.to, _T.float, _T.double, _T.half, _T.bfloat16, _T.type_as, _T.type,
    _T.add, _T.__add__, _T.__radd__, _T.sub, _T.__sub__, _T.__rsub__, _T.mul, _T.__mul__, _T.__rmul__,
    _T.div, _T.__truediv__, _T.pow, _T.__pow__, _T.square, _T.neg, _T.__neg__, _T.rsqrt, _T.sqrt,
    torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.square, torch.neg, torch.rsqrt, torch.sqrt,
    _T.dtype.__get__, _T.device.__get__, _T.ndim.__get__, _T.requires_grad.__get__, _T.is_cuda.__get__,  # type: ignore[attr-defined]
    _T.dim, _T.is_floating_point, _T.is_contiguous, _T.contiguous,
}  # fmt: skip
_MEANS = {_T.mean, torch.mean}


class Width(torch.Tensor):
    """This rank's equal part of every row, `[... e / P]`. Element by element it is a plain tensor.

    The mean over the last dimension is that of whole rows, with its gradient. DTensors it meets, such as the
    weights of a norm, stand for the same part.

    Raises:
        NotImplementedError: another function of it is asked for, which might need whole rows.
    """

    group: Group

    @staticmethod
    def of(x: Tensor, group: Group) -> Width:
        """A view of x, differentiable."""
        rows = x.as_subclass(Width)
        rows.group = group
        return rows

    def plain(self) -> Tensor:
        """The part as a plain tensor."""
        with without_subclass():
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func not in _ELEMENTWISE | _MEANS:
            name = getattr(func, "__qualname__", getattr(func, "__name__", func))
            raise NotImplementedError(
                f"{name} of rows that are sharded over ranks is not served, for it may need whole rows; a "
                "norm over a sharded width must be written with means over the last dimension, as "
                "transformers' RMS norms are"
            )
        group = next(x.group for x in (*args, *given.values()) if isinstance(x, Width))
        args = tuple(map(_part, args))
        given = {name: _part(x) for name, x in given.items()}
        if func in _MEANS:
            return _mean(group, *args, **given)
        result = func(*args, **given)
        return Width.of(result, group) if isinstance(result, Tensor) else result


def _part(x: Any) -> Any:
    if isinstance(x, Width):
        return x.plain()
    return x.to_local() if isinstance(x, DTensor) else x


def _mean(
    group: Group, x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """The mean of whole rows, which every rank uses for its own part."""
    if dim not in (-1, x.ndim - 1, (-1,), [-1]):
        raise NotImplementedError(
            f"rows that are sharded over ranks have means over dim -1 only, got dim={dim}"
        )
    total = replicate(all_reduce(x.sum(-1, keepdim=keepdim, dtype=dtype), group), group)
    return total / (x.shape[-1] * group.size)
