"""Looks, where tasks run, whether a function can run there: its source is executed and its imports are tried."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

from rhapsody_mcp.engine.task.error_text import line_in, words

__all__ = ["check", "imports_of"]


def check(text: str, entry: str) -> list[str]:
    """What keeps the function `entry` of this source from running here, in words; empty where nothing does.

    Imports inside functions are tried too. Those that the source itself can do without are not: the ones below
    a `try` that catches their failure, and those for a type checker.
    """
    problems = [problem for statement in imports_of(ast.parse(text)) for problem in _try(statement)]
    return problems or _execute(text, entry)


def imports_of(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that the source cannot do without."""
    children: Iterable[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node
    elif isinstance(node, ast.Try) and any(_catches_failure(handler) for handler in node.handlers):
        children = [*node.orelse, *node.finalbody]
    elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = node.orelse
    for child in children:
        yield from imports_of(child)


def _catches_failure(handler: ast.ExceptHandler) -> bool:
    names = "Exception" if handler.type is None else ast.unparse(handler.type)
    return any(name in names for name in ("ImportError", "ModuleNotFoundError", "Exception"))


def _try(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """What is wrong with each module, and each name of a module, that the statement imports."""
    if isinstance(statement, ast.Import):
        wanted = [(alias.name, "") for alias in statement.names]
    else:
        module = "." * statement.level + (statement.module or "")
        wanted = [(module, "" if alias.name == "*" else alias.name) for alias in statement.names]
    for module, name in wanted:
        try:
            _import(module, name)
        except Exception as error:  # a module's own code runs
            yield f"line {statement.lineno}: {_words(error)}"


def _import(module: str, name: str) -> None:
    if module.startswith("."):
        raise ImportError(f"{module} is relative, and the source belongs to no package; import by the full name")
    found = importlib.import_module(module)
    if name and not hasattr(found, name):
        try:
            importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            raise ImportError(f"module {module!r} has no {name!r}") from None


def _execute(text: str, entry: str) -> list[str]:
    module = sys.modules[_NAME] = ModuleType(_NAME)
    filename = f"<source of {entry}>"
    try:
        exec(compile(text, filename, "exec", dont_inherit=True), vars(module))
    except Exception as error:  # the source's own code runs
        return [f"its top level fails: {_words(error)} (line {line_in(error, filename)} of the source)"]
    finally:
        del sys.modules[_NAME]
    return [] if callable(getattr(module, entry, None)) else [f"its top level leaves no function {entry!r}"]


_NAME = "rhapsody_checked_source"


def _words(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"no module {error.name!r} is installed"
    return words(error)
