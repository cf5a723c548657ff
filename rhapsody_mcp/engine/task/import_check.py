"""Checks, in the process for user code, whether a function can run there: executes its source and tries its imports."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType

from rhapsody_mcp.engine.task.error_text import error_line, error_message

__all__ = ["check", "imports_of"]


def check(text: str, entry: str) -> list[str]:
    """Return the problems that keep the function `entry` of the source `text` from running here; empty if there are
    none.

    The check tries imports inside functions too. It skips imports that the source handles itself: those in a `try` that
    catches an import error, and those for type checkers.
    """
    problems = [problem for statement in imports_of(ast.parse(text)) for problem in _import_problems(statement)]
    return problems or _execute(text, entry)


def imports_of(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements that the source cannot do without."""
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


def _import_problems(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield a problem for each module, and each name of a module, that the statement cannot import."""
    if isinstance(statement, ast.Import):
        names = [(alias.name, "") for alias in statement.names]
    else:
        module = "." * statement.level + (statement.module or "")
        names = [(module, "" if alias.name == "*" else alias.name) for alias in statement.names]
    for module, name in names:
        try:
            _import_name(module, name)
        except Exception as error:  # importing runs the module's code, which may raise anything
            yield f"line {statement.lineno}: {_problem(error)}"


def _import_name(module: str, name: str) -> None:
    if module.startswith("."):
        raise ImportError(f"{module} is relative, and the source belongs to no package; import by the full name")
    imported = importlib.import_module(module)
    if name and not hasattr(imported, name):
        try:
            importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError:
            raise ImportError(f"module {module!r} has no {name!r}") from None


def _execute(text: str, entry: str) -> list[str]:
    module = sys.modules[_MODULE_NAME] = ModuleType(_MODULE_NAME)
    filename = f"<source of {entry}>"
    try:
        exec(compile(text, filename, "exec", dont_inherit=True), vars(module))
    except Exception as error:  # the source may raise anything
        return [f"its top level fails: {_problem(error)} (line {error_line(error, filename)} of the source)"]
    finally:
        del sys.modules[_MODULE_NAME]
    return [] if callable(getattr(module, entry, None)) else [f"its top level leaves no function {entry!r}"]


_MODULE_NAME = "rhapsody_checked_source"


def _problem(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"no module {error.name!r} is installed"
    return error_message(error)
