"""`mutants_of`: a file with one small change, for each place where one can be made."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What takes the place of an operator.
_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
# Fields of a node in which nothing runs that a test could notice: types, and the texts of errors.
_SILENT = {"annotation", "returns", "decorator_list", "bases", "msg", "exc", "cause"}


@dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Args:
        line: where the change is, from 1.
        before, after: the code in its place.
        text: the whole file with the change.
    """

    file: Path
    line: int
    before: str
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


def mutants_of(file: Path) -> list[Mutant]:
    """All mutants of a file, in the order of their lines."""
    source = file.read_text()
    found = []
    for node, other in _changes(ast.parse(source)):
        before = " ".join((ast.get_source_segment(source, node) or "").split())
        after = ast.unparse(ast.fix_missing_locations(other))
        if isinstance(node, ast.expr):
            after = f"({after})"
        text = _replaced(source.splitlines(keepends=True), node, after)
        found.append(Mutant(file, node.lineno, before, after, text))
    return sorted(found, key=lambda mutant: mutant.line)


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, ast.AST]]:
    """The expressions and statements that run, each with what may take its place."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.If) and _is_for_types(node)):
        return
    if isinstance(node, ast.expr | ast.stmt):
        for other in _others(node):
            yield node, other
    conditions = [node.test] if isinstance(node, ast.If | ast.While | ast.IfExp) else []
    conditions += node.ifs if isinstance(node, ast.comprehension) else []
    for condition in conditions:
        yield condition, ast.UnaryOp(ast.Not(), condition)
    for name, value in ast.iter_fields(node):
        if name not in _SILENT:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _changes(child)


def _others(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in _OTHER:
            yield _with(node, op=_OTHER[type(op)]())
        case ast.Compare(ops=ops):
            for place, op in enumerate(ops):
                yield _with(node, ops=[*ops[:place], _OTHER[type(op)](), *ops[place + 1 :]])
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield ast.Pass()
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()


def _is_for_types(node: ast.If) -> bool:
    return ast.unparse(node.test) == "TYPE_CHECKING"


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _replaced(lines: list[str], node: ast.expr | ast.stmt, after: str) -> str:
    """The file with other code in the place of a node; what follows stays on its lines."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    head = lines[first].encode()[: node.col_offset].decode()
    tail = lines[last].encode()[node.end_col_offset :].decode()
    return "".join(
        [*lines[:first], head + after + tail, *["\n"] * (last - first), *lines[last + 1 :]]
    )
