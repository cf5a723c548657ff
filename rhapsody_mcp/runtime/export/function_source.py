"""Decides which source texts can stand in a script as functions, and which must be kept as texts."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Collection, Iterator

from rhapsody_mcp.runtime.export.literals import write_text, write_value
from rhapsody_mcp.runtime.serialization import Source

__all__ = ["SourceWriter"]

_BUILTINS = frozenset(dir(builtins))
_INTROSPECTION = {
    "eval",
    "exec",
    "globals",
    "vars",
    "dir",
    "__name__",
    "__doc__",
    "__spec__",
    "__loader__",
    "__package__",
}


class SourceWriter:
    """The functions of one script. A text becomes functions of the script where they mean the same there.

    That is so where it holds only imports, constants and undecorated functions, where these need no other names,
    and where no other text of the script, nor the script's own `beginning`, has the same names for something else.
    What is not `tried`, because no task has run it to its end, must not be able to fail where the script begins.
    """

    def __init__(self, preamble: str) -> None:
        self.definitions: list[str] = []
        self._meanings = dict(_meanings(ast.parse(preamble)))
        self._defined: set[str] = set()
        self._text_variables: dict[str, str] = {}

    @property
    def names(self) -> set[str]:
        """Every name that the script has at its top level by now."""
        return set(self._meanings)

    def write(self, source: Source, *, proven: bool = True) -> str:
        """The expression for this function; its definition is in `definitions` then."""
        if source.text not in self._defined and source.text not in self._text_variables:
            self._define(source.text, proven)
        if source.text in self._defined:
            return source.function_name
        entry = f", {write_value(source.entry)}" if source.entry else ""
        return f"Source({self._text_variables[source.text]}{entry})"

    def _define(self, text: str, proven: bool) -> None:
        tree = ast.parse(text)
        meanings = dict(_meanings(tree))
        clash = any(self._meanings.get(name, meaning) != meaning for name, meaning in meanings.items())
        if _is_self_contained(tree, meanings) and not clash and (proven or _cannot_fail(tree)):
            self._meanings |= meanings
            self._defined.add(text)
            self.definitions.append(text.strip("\n"))
        else:
            name = self._text_variables[text] = self._new_name()
            self.definitions.append(f"{name} = {write_text(text)}")

    def _new_name(self) -> str:
        number = 1
        while (name := f"SOURCE_{number}") in self._meanings:
            number += 1
        self._meanings[name] = "the text of a source"
        return name


def _meanings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each name that the text's top level gives, with what it stands for there."""
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                first = alias.name.partition(".")[0]
                yield alias.asname or first, f"module {alias.name if alias.asname else first}"
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                yield alias.asname or alias.name, f"{alias.name} of module {statement.module}"
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield statement.name, ast.dump(statement)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    yield target.id, ast.dump(statement)


def _is_self_contained(tree: ast.Module, meanings: dict[str, str]) -> bool:
    nodes = list(ast.walk(tree))
    if not all(map(_is_plain, tree.body)) or any(isinstance(node, ast.Global) for node in nodes):
        return False  # what changes globals: each function of a script takes its own copy of them along
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    known = _BUILTINS - _INTROSPECTION | meanings.keys() | set(_local_names(nodes))
    return used <= known and not meanings.keys() & _BUILTINS


def _cannot_fail(tree: ast.Module) -> bool:
    """Whether defining its functions imports and calculates nothing."""
    imports = any(isinstance(statement, ast.Import | ast.ImportFrom) for statement in tree.body)
    arguments = [
        statement.args for statement in tree.body if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    defaults = [default for each in arguments for default in [*each.defaults, *each.kw_defaults] if default is not None]
    return not imports and all(map(_is_constant, defaults))


def _is_plain(statement: ast.stmt) -> bool:
    match statement:
        case ast.Import():
            return True
        case ast.ImportFrom(module=module, level=level, names=names):
            return module != "__future__" and level == 0 and names[0].name != "*"
        case ast.FunctionDef(decorator_list=decorators) | ast.AsyncFunctionDef(decorator_list=decorators):
            return not decorators
        case ast.Assign(targets=[ast.Name()], value=value):
            return _is_constant(value)
        case ast.Expr(value=ast.Constant(value=str())):
            return True
    return False


def _is_constant(value: ast.expr) -> bool:
    """A number, a text, or a tuple of such: nothing that a function could change."""
    if isinstance(value, ast.UnaryOp):
        return _is_constant(value.operand)
    return isinstance(value, ast.Constant) or (isinstance(value, ast.Tuple) and all(map(_is_constant, value.elts)))


def _local_names(nodes: Collection[ast.AST]) -> Iterator[str]:
    for node in nodes:
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=asname):
                yield asname or name.partition(".")[0]
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield name
