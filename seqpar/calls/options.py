"""Options of a plan are told, compared and written here alone, all derived from its fields.

Agreement and replay compare what is `told`. Compiled ops take what is `written`, since ops take neither plans
nor groups, and `read` it again. A new field of `Plan` of a type that is known here needs no line elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from seqpar.comm import Grid, Group
from seqpar.layout import Layout, Mask
from seqpar.layout.written import read_masks
from seqpar.strategies.plan import Plan
from seqpar_kernels import TABLES, TENSORS, TERMS, Score, Term
from seqpar_kernels.terms.modifiers import captured, described


def told(**options: object) -> dict[str, object]:
    """The claim that ranks compare of options, by the names that users give them."""
    claim: dict[str, object] = {}
    for name, value in options.items():
        if isinstance(value, Layout):
            claim |= {name: value, f"spans of {name}": value.fingerprint}
        elif isinstance(value, Grid):
            claim[name] = value.members
        elif isinstance(value, Score):
            for part in fields(Score):
                x = getattr(value, part.name)
                # Of tensors the type, not the values: to compare those would cost a wait for the device.
                # docs/design.md: slopes and sinks are compared by presence and type
                claim[part.name] = _kind_of(part.name, x) if isinstance(x, Tensor) else x
                if callable(x):
                    learns = [held.requires_grad for held in captured(x)]
                    claim[part.name] = described(x), learns, torch.is_grad_enabled()
        elif isinstance(value, Term) and not value.acts:
            claim[name] = None
        else:
            claim[name] = value
    return claim


def _kind_of(name: str, x: Tensor) -> object:
    """What is told of a tensor of a score: how a bias broadcasts differs from call to call."""
    return (x.dtype, tuple(x.shape)) if name in TABLES else x.dtype


def told_of(plan: Plan) -> dict[str, object]:
    """The claim of a plan: what ranks compare, and what must be the same when a call is recomputed."""
    return told(**{name: getattr(plan, name) for name in _NAMES})


@dataclass(frozen=True)
class _Kind:
    """The way in which values of a type are arguments of an op.

    Args:
        arguments: the types of torch's schema that a value is written as.
        write: the values of these.
        read: the inverse, given the group too.
    """

    arguments: tuple[str, ...]
    write: Callable[[Any], tuple[Any, ...]]
    read: Callable[..., Any]


def _one(value: Any) -> tuple[Any, ...]:
    return (value,)


def _same(_: Group, value: Any) -> Any:
    return value


def _code(value: Any) -> tuple[str | None]:
    return (None if value is None else value.code,)


def _layout(layout: Layout | None) -> tuple[Tensor | None]:
    return (None if layout is None else layout.code_bytes,)


def _read_layout(_: Group, written: Tensor | None) -> Layout | None:
    return None if written is None else Layout.decoded(bytes(written.tolist()).decode())


def _grid(group: Group, code: str | None) -> Grid | None:
    return None if code is None else Grid.decoded(code, group)


def _masks(mask: Mask | tuple[Mask, ...]) -> tuple[Tensor, bool]:
    """A mask, or one for each batch entry, as a tensor; and whether it is several."""
    if isinstance(mask, Mask):
        return mask.numbers, False
    return torch.cat([each.numbers for each in mask]), True


def _read_masks(_: Group, numbers: Tensor, several: bool) -> Mask | tuple[Mask, ...]:
    masks = tuple(read_masks(numbers))
    return masks if several else masks[0]


def _term_kind(kind: type[Term]) -> _Kind:
    """How a term that a plan may hold is written: as its parameters, of which integers may be symbols."""
    names = tuple(part.name for part in fields(kind))

    def write(term: Term | None) -> tuple[Any, ...]:
        return tuple(None if term is None else getattr(term, name) for name in names)

    def read(_: Group, *values: Any) -> Term | None:
        """A symbol is of a plan that only tells shapes, which do not depend on it."""
        return None if any(isinstance(x, torch.SymInt) for x in values) else kind.read(values)

    types = ("SymInt?" if type_ == "int?" else type_ for type_, _ in kind.schema())
    return _Kind(tuple(types), write, read)


# Of a score what is no tensor: tensors are arguments of their own.
_NUMBERS = tuple(part.name for part in fields(Score) if part.name not in (*TENSORS, "score_mod"))


def _numbers(score: Score) -> tuple[Any, ...]:
    return tuple(getattr(score, name) for name in _NUMBERS)


def _score(_: Group, *numbers: float | None) -> Score:
    return replace(Score(), **dict(zip(_NUMBERS, numbers, strict=True)))  # type: ignore[arg-type]


# By the annotation of a field. What the compiler may hold as a symbol is an argument that may be one.
_KINDS = {
    "Layout": _Kind(("Tensor",), _layout, _read_layout),
    "Layout | None": _Kind(("Tensor?",), _layout, _read_layout),
    "Grid | None": _Kind(("str?",), _code, _grid),
    "Mask | tuple[Mask, ...]": _Kind(("Tensor", "bool"), _masks, _read_masks),
    "Score": _Kind(("float?",) * len(_NUMBERS), _numbers, _score),
    "Implementation | None": _Kind(("str?",), _one, _same),
    "Agree": _Kind(("str",), _one, _same),
}
for _plain in ("str", "int", "bool", "float"):
    _KINDS[_plain] = _Kind((_plain,), _one, _same)
    _KINDS[f"{_plain} | None"] = _Kind((f"{_plain}?",), _one, _same)

for _term in (kind for kind in TERMS if not kind.asks_each):
    _KINDS[f"{_term.__name__} | None"] = _term_kind(_term)

# docs/design.md: options are the fields of `Plan`
# The type of a field is text, because annotations in plan.py are not evaluated.
_OPTIONS = tuple((f.name, _KINDS[str(f.type)]) for f in fields(Plan) if f.name != "group")
_NAMES = tuple(name for name, _ in _OPTIONS)

# The arguments of an op that takes a plan, but for its tensors: torch's schema.
SCHEMA = ", ".join(
    f"{kind} {name}{n or ''}" for name, of in _OPTIONS for n, kind in enumerate(of.arguments)
)


def written(plan: Plan) -> list[Any]:
    """Writes a plan, but for its group and tensors, as `SCHEMA`. Compilers trace this: it makes no object."""
    values: list[Any] = []
    for name, kind in _OPTIONS:
        values += kind.write(getattr(plan, name))
    return values


def read(group: Group, values: Iterator[Any], *, content: bool = True) -> Plan:
    """Reads a plan that was `written`, without tensors, and leaves the values behind its last.

    Args:
        content: whether tensors have any. Otherwise what they say, masks and layouts, is left out.
    """
    options: dict[str, Any] = {}
    for name, kind in _OPTIONS:
        given = [next(values) for _ in kind.arguments]
        says = content or not any(isinstance(x, Tensor) for x in given)
        options[name] = kind.read(group, *given) if says else None
    return Plan(group, **options)
