"""Functions of one score, as FlexAttention takes them: evaluated on a block, described, and what they hold.

Source: He et al. 2024, FlexAttention (arXiv:2412.05496).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from seqpar_kernels.terms.term import Place

Modifier = Callable[..., Tensor]


def evaluate(modifier: Modifier, scores: Tensor | None, like: Tensor, place: Place) -> Tensor:
    """The modifier of each score of a block, `[b hq i j]`.

    It sees one score at a time: (score if there are any, batch, head, row, column), all 0-dimensional.

    Args:
        like: a tensor `[b hq ...]` of the batch entries and heads at hand.
    """
    b, hq = like.shape[:2]
    batch, head = (torch.arange(n, device=place.row.device) for n in (b, hq))
    where = batch + place.batch, head + place.head, place.row, place.col
    each, first = modifier, () if scores is None else (scores,)
    # docs/design.md: functions of one score are asked by the reference alone
    for dim in reversed(range(4)):
        dims = *((0,) * len(first)), *(0 if n == dim else None for n in range(4))
        each = torch.vmap(each, in_dims=dims)
    return each(*first, *where)


def captured(modifier: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yields the tensors that a function holds: in its closure and defaults, or as a partial or module does.

    Global variables are not looked at.
    """
    seen = set() if seen is None else seen
    if id(modifier) in seen:
        return
    seen.add(id(modifier))
    if isinstance(modifier, Tensor):
        yield modifier
        return
    for held in _held(modifier):
        yield from captured(held, seen)


def _held(x: Any) -> Iterator[Any]:
    if isinstance(x, torch.nn.Module):
        yield from (*x.parameters(), *x.buffers())
    elif isinstance(x, partial):
        yield from (x.func, *x.args, *x.keywords.values())
    elif isinstance(x, (list, tuple)):
        yield from x
    elif isinstance(x, dict):
        yield from x.values()
    elif isinstance(x, Both):
        yield from (x.one, x.other)
    elif callable(x):
        for cell in getattr(x, "__closure__", None) or ():
            yield cell.cell_contents
        yield from getattr(x, "__defaults__", None) or ()
        yield from (getattr(x, "__kwdefaults__", None) or {}).values()
        yield getattr(x, "__self__", None)


def described(modifier: Modifier) -> str:
    """What ranks compare of a function: its name, its code, and the shapes and types of what it holds."""
    tensors = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in captured(modifier))
    name = getattr(modifier, "__qualname__", type(modifier).__qualname__)
    return f"{name} {_code(modifier)} of [{tensors}]"


def _code(modifier: Any) -> str:
    """A hash of the code, constants in it included; the same in every process that runs the same program."""
    code = getattr(modifier, "__code__", None)
    inner = getattr(modifier, "func", None)
    if isinstance(modifier, Both):
        return f"{_code(modifier.one)} {_code(modifier.other)}"
    if code is None:
        return "" if inner is None else _code(inner)
    return hashlib.blake2b(repr(_constants(code)).encode(), digest_size=4).hexdigest()


def _constants(code: CodeType) -> tuple[Any, ...]:
    inner = (_constants(x) if isinstance(x, CodeType) else repr(x) for x in code.co_consts)
    return code.co_code, code.co_names, *inner


@dataclass(frozen=True)
class Both:
    """Two functions that both have to show a score."""

    one: Modifier
    other: Modifier

    def __call__(self, *where: Tensor) -> Tensor:
        """Whether both do."""
        return self.one(*where) & self.other(*where)


def both_show(one: Modifier | None, other: Modifier | None) -> Modifier | None:
    """What two functions show, either of which may say nothing."""
    return other if one is None else one if other is None else Both(one, other)


def check_modifier(name: str, modifier: Modifier, like: Tensor, *, scores: bool) -> None:
    """Raises where a function cannot modify scores; it is tried on the first positions.

    Raises:
        ValueError: it raises, it looks at values, or gives something else than it should.
    """
    first = torch.zeros(1, dtype=torch.long, device=like.device)
    place = Place(first, first, 0)
    one = like.new_zeros(1, 1, 1, 1)
    try:
        with torch.no_grad():
            found = evaluate(modifier, one if scores else None, one, place)
    except Exception as error:
        what = f"{'score, ' if scores else ''}batch, head, row and column"
        raise ValueError(
            f"{name} must be a function of {what}, each a 0-dimensional tensor at whose values it does not "
            f"look; it raised {type(error).__name__}: {error}"
        ) from error
    right = found.is_floating_point() if scores else found.dtype == torch.bool
    if not right or found.shape != one.shape:
        what, got = (
            "a floating point" if scores else "a boolean",
            f"{found.dtype} {tuple(found.shape)}",
        )
        raise ValueError(f"{name} must give {what} scalar for each score, got {got}")
