"""Functions of one score, as FlexAttention takes them: evaluated on a block, described, and what they hold.

Source: He et al. 2024, FlexAttention (arXiv:2412.05496).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType, ModuleType
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


def captured(modifier: object) -> tuple[Tensor, ...]:
    """The tensors that a function uses, as far as its code tells: each once.

    They are in its closure, its defaults or global variables; of what else it uses (functions, partials,
    modules and other objects, lists and dictionaries) the parts that it names. What learns and is not found
    is refused, see `check_modifier`.
    """
    found: dict[int, Tensor] = {}
    _search(modifier, frozenset(), found, set())
    return tuple(found.values())


def _search(x: Any, names: frozenset[str], found: dict[int, Tensor], seen: set[Any]) -> None:
    if (id(x), names) in seen or x is None or isinstance(x, (type, ModuleType)):
        return
    seen.add((id(x), names))  # by other names another part may be meant
    if isinstance(x, Tensor):
        found[id(x)] = x
        return
    for held, by in _held(x, names):
        _search(held, by, found, seen)


def _held(x: Any, names: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
    """Yields what an object holds, and the names by which it is used."""
    code = getattr(x, "__code__", None)
    if isinstance(x, torch.nn.Module):
        yield x.forward, names
    if code is not None:  # a function, or a method
        names = frozenset(_names(code))
        yield getattr(x, "__self__", None), names
        cells = getattr(x, "__closure__", None) or ()
        held = [*(cell.cell_contents for cell in cells), *(getattr(x, "__defaults__", None) or ())]
        held += (getattr(x, "__kwdefaults__", None) or {}).values()
        held += (x.__globals__[name] for name in names if name in x.__globals__)
    elif isinstance(x, partial):
        held = [x.func, *x.args, *x.keywords.values()]
    elif isinstance(x, (list, tuple)):
        held = list(x)
    elif isinstance(x, dict):
        held = list(x.values())
    else:
        own = vars(x) if hasattr(x, "__dict__") else {}
        parts = [own, *(own.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules"))]
        held = [part[name] for part in parts for name in names if name in part]
        held += [x.__call__] if callable(x) and not isinstance(x, torch.nn.Module) else []
    yield from ((each, names) for each in held)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


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
    unknown = _learns(found, captured(modifier)) if scores and found.requires_grad else None
    if unknown is not None:
        raise ValueError(
            f"{name} uses a tensor {tuple(unknown.shape)} that learns, which was not found in it: let it be "
            "in the closure of the function, or an attribute or argument that it names"
        )


def _learns(x: Tensor, known: Sequence[Tensor]) -> Tensor | None:
    """A leaf that the graph of x leads to, but by no known tensor; `None` if there is none."""
    ends = {id(y.grad_fn) for y in known if y.grad_fn is not None}
    leaves, nodes, seen = {id(y) for y in known}, [x.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in seen or id(node) in ends:
            continue
        seen.add(id(node))
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            return leaf
        nodes += (following for following, _ in node.next_functions)
    return None
