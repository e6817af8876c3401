"""The form of a mask function: whether it is made as another one is, whatever tensors both close over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Hole:
    """Stands in a form for what says nothing of it, such as the padding of these rows."""

    kind: type

    def __call__(self, *_: object) -> bool:
        """Makes it one of the mask functions that others are made of; never called."""
        raise NotImplementedError(f"{self} is no mask")


A_TENSOR, A_FUNCTION, A_NUMBER = Hole(Tensor), Hole(FunctionType), Hole(int)


def filled(function: object, form: Callable[..., Any]) -> list[Any] | None:
    """What a function has in the holes of a form, in their order; `None` if it is of another form.

    It is of the form if it has the same code, and closed over the same integers and over functions of the
    same forms.
    """
    found: list[Any] = []
    return found if _is_of(function, form, found) else None


def names_of(function: object) -> str:
    """The functions that a mask function is made of, by name."""
    if isinstance(function, tuple):
        return " and ".join(names_of(f) for f in function)
    if not isinstance(function, FunctionType):
        return repr(function)
    inner = [
        f
        for value in _closed_over(function)
        for f in (value if isinstance(value, tuple) else (value,))
        if isinstance(f, FunctionType)
    ]
    name = function.__qualname__.split(".")[0]
    return f"{name}({', '.join(map(names_of, inner))})" if inner else name


def _is_of(one: object, form: object, found: list[Any]) -> bool:
    if isinstance(form, Hole):
        found.append(one)
        return isinstance(one, form.kind)
    if isinstance(one, FunctionType) and isinstance(form, FunctionType):
        if one.__code__ is not form.__code__:
            return False
        return _is_of(_closed_over(one), _closed_over(form), found)
    if isinstance(one, tuple) and isinstance(form, tuple):
        pairs = zip(one, form, strict=False)
        return len(one) == len(form) and all(_is_of(x, y, found) for x, y in pairs)
    return type(one) is type(form) and isinstance(one, int) and one == form


def _closed_over(function: FunctionType) -> tuple[object, ...]:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())
