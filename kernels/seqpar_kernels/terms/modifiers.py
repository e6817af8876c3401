"""Functions of one score, as FlexAttention takes them: evaluated on a block, described, and what they hold.

Source: He et al. 2024, FlexAttention (arXiv:2412.05496).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from seqpar_kernels.terms.term import Place
from seqpar_kernels.transfer import on_device

Modifier = Callable[..., Tensor]
_FROZEN = "__made_of__"


def evaluate(modifier: Modifier, scores: Tensor | None, like: Tensor, place: Place) -> Tensor:
    """The modifier of each score of a block, `[b hq i j]`.

    It sees one score at a time: (score if there are any, batch, head, row, column), all 0-dimensional.

    Args:
        like: a tensor `[b hq ...]` of the batch entries and heads at hand.
    """
    batch, head = (torch.arange(n, device=place.row.device) for n in like.shape[:2])
    return asked(modifier, scores, batch + place.batch, head + place.head, place.row, place.col)


def asked(modifier: Modifier, scores: Tensor | None, *where: Tensor) -> Tensor:
    """The modifier for all combinations of batch entries, heads, rows and columns, each by number."""
    first = () if scores is None else (scores,)
    if not all(map(len, where)):  # which torch.vmap does not take
        dtype = torch.bool if scores is None else scores.dtype
        return torch.empty([len(x) for x in where], dtype=dtype, device=where[0].device)
    each = modifier
    # docs/design.md: functions of one score are asked by the reference, or compiled
    for dim in reversed(range(4)):
        dims = *((0,) * len(first)), *(0 if n == dim else None for n in range(4))
        each = torch.vmap(each, in_dims=dims)
    return each(*first, *where)


@contextmanager
def apart() -> Iterator[None]:
    """A block that differentiates by itself: what is saved in it is no business of a checkpoint around it."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
        yield


def _same(x: Tensor) -> Tensor:
    return x


def as_it_is(modifier: Modifier) -> Modifier:
    """The function with what it uses now, whatever its variables become.

    A variable of a loop is another in the next turn, and backward asks the function again. Objects are not
    copied; what they hold must be the same in backward, see `captured`.
    """
    return _frozen(modifier, {})


def _frozen(x: Any, made: dict[int, Any]) -> Any:
    if id(x) in made:
        return made[id(x)]
    if isinstance(x, partial):
        args = [_frozen(each, made) for each in x.args]
        return partial(_frozen(x.func, made), *args, **x.keywords)
    if not isinstance(x, FunctionType) or hasattr(x, _FROZEN):
        return x
    names = frozenset(_names(x.__code__))
    around = {name: x.__globals__[name] for name in names if name in x.__globals__}
    around |= {
        name: x.__globals__[name] for name in ("__builtins__", "__name__") if name in x.__globals__
    }
    cells = tuple(CellType() for _ in x.__closure__ or ())
    made[id(x)] = copy = FunctionType(x.__code__, around, x.__name__, x.__defaults__, cells)
    copy.__kwdefaults__, copy.__qualname__ = x.__kwdefaults__, x.__qualname__
    setattr(copy, _FROZEN, x)  # which stays alive, and with it its name among `made`
    for cell, old in zip(cells, x.__closure__ or (), strict=True):
        cell.cell_contents = _frozen(old.cell_contents, made)
    for name, value in around.items():
        # Functions of the same program, not those of libraries.
        if isinstance(value, FunctionType) and value.__globals__ is x.__globals__:
            around[name] = _frozen(value, made)
    return copy


def captured(modifier: object) -> tuple[Tensor, ...]:
    """The tensors that a function uses, as far as its code tells: each once.

    They are in its closure, its defaults or global variables; of what else it uses (functions, partials,
    modules and other objects, lists and dictionaries) the parts that it names. What learns and is not found
    is refused, see `check_modifier`.
    """
    return _found(modifier)[0]


def _found(modifier: object) -> tuple[tuple[Tensor, ...], list[str]]:
    """The tensors that a function uses, and the numbers and words as text."""
    found: dict[int, Tensor] = {}
    words: list[str] = []
    _search(modifier, frozenset(), (found, words), {})
    return tuple(found.values()), words


def _search(
    x: Any, names: frozenset[str], found: tuple[dict[int, Tensor], list[str]], seen: dict[Any, Any]
) -> None:
    if isinstance(x, (bool, int, float, str)):
        found[1].append(repr(x))
        return
    if (id(x), names) in seen or x is None or isinstance(x, (type, ModuleType)):
        return
    # By other names another part may be meant. It is kept, or another object may have its id.
    seen[id(x), names] = x
    if isinstance(x, Tensor):
        found[0][id(x)] = x
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


def held_by(modifiers: Sequence[Modifier]) -> tuple[Tensor, ...]:
    """The tensors that some functions use."""
    return tuple(x for modifier in modifiers for x in captured(modifier))


def check_held(before: Sequence[Tensor], modifiers: Sequence[Modifier]) -> None:
    """Raises where functions use other tensors than they did.

    Raises:
        RuntimeError: they do.
    """
    now = held_by(modifiers)
    if len(now) != len(before) or any(x is not y for x, y in zip(now, before, strict=True)):
        raise RuntimeError(
            "a score_mod or mask_mod uses other tensors in backward than in forward: what it holds must stay"
        )


def described(modifier: Modifier) -> str:
    """What ranks compare of a function: name, code, numbers, and the shapes and types of tensors."""
    found, words = _found(modifier)
    tensors = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in found)
    name = getattr(modifier, "__qualname__", type(modifier).__qualname__)
    return f"{name} {_code(modifier)} of [{', '.join([tensors, *words])}]"


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
    inner = (_constants(x) if isinstance(x, CodeType) else _text(x) for x in code.co_consts)
    return code.co_code, code.co_names, *inner


def _text(x: Any) -> str:
    """A constant as text; the order of a set is another in every process."""
    return repr(sorted(map(repr, x))) if isinstance(x, frozenset) else repr(x)


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


def check_modifier(
    name: str, modifier: Modifier, corners: Sequence[Sequence[int]], like: Tensor, *, scores: bool
) -> None:
    """Raises where a function cannot modify scores; it is tried on the first and last positions.

    Args:
        corners: first and last batch entry, head, row and column.
        like: a tensor of the type and device of scores.

    Raises:
        ValueError: it raises, it looks at values, or gives something else than it should; or tensors that
            learn in it are not found, or are made of others.
    """
    where = [on_device(ends, like.device) for ends in corners]
    shape = [len(ends) for ends in corners]
    try:
        with apart() if torch.is_grad_enabled() else nullcontext():
            found = asked(modifier, like.new_zeros(shape) if scores else None, *where)
    except Exception as error:
        what = f"{'score, ' if scores else ''}batch, head, row and column"
        raise ValueError(
            f"{name} must be a function of {what}, each a 0-dimensional tensor at whose values it does not "
            f"look; at first and last positions it raised {type(error).__name__}: {error}"
        ) from error
    right = found.is_floating_point() if scores else found.dtype == torch.bool
    if not right or list(found.shape) != shape:
        what, got = (
            "a floating point" if scores else "a boolean",
            f"{found.dtype} {tuple(found.shape[4:])}",
        )
        raise ValueError(f"{name} must give {what} scalar for each score, got {got}")
    if not scores or not found.requires_grad:
        return
    held = [x for x in captured(modifier) if x.requires_grad]
    unknown = _leads_to(found, held)
    if unknown is not None:
        raise ValueError(
            f"{name} uses a tensor {tuple(unknown.shape)} that learns, which was not found in it: let it be "
            "in the closure of the function, or an attribute or argument that it names"
        )
    for x in held:
        others = [y for y in held if y is not x]
        if x.grad_fn is not None and _meets(x, others):
            raise ValueError(
                f"{name} holds a tensor {tuple(x.shape)} that is made of another one that it holds, whose "
                "gradient would count twice: hold one of them"
            )


def _leads_to(x: Tensor, known: Sequence[Tensor]) -> Tensor | None:
    """A leaf that the graph of x leads to, but by no known tensor; `None` if there is none."""
    leaves = {id(y) for y in known}
    for node in _nodes(x, known):
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in leaves:
            return leaf
    return None


def _meets(x: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether the graph of x leads to one of the others."""
    nodes = list(_nodes(x, ()))
    ends = {id(y.grad_fn) for y in others if y.grad_fn is not None}
    leaves = {id(y) for y in others}
    return any(id(node) in ends or id(getattr(node, "variable", None)) in leaves for node in nodes)


def _nodes(x: Tensor, stops: Sequence[Tensor]) -> Iterator[Any]:
    """Yields the nodes of a graph, but those behind some tensors."""
    ends = {id(y.grad_fn) for y in stops if y.grad_fn is not None}
    waiting, seen = [x.grad_fn], {}
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen or id(node) in ends:
            continue
        seen[id(node)] = node
        yield node
        waiting += (following for following, _ in node.next_functions)
