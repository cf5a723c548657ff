"""Which functions can go from one version of Python into another."""

from __future__ import annotations

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Call, Command, Completion
from rhapsody_mcp.model.values import holds_code, version_here

__all__ = ["refuse_code"]


def refuse_code(work: Call | Command | Completion, python: str, version: str, own: str = "") -> None:
    """Raise InvalidTask where a function, or one of its arguments, is bytecode of the Python of the engine, of version
    `own`, and `python` has another version."""
    own = own or version_here()
    if not isinstance(work, Call) or version == own:
        return
    for what, pickled in (("function", work.code if work.form == "pickle" else b""), ("arguments", work.arguments)):
        if holds_code(pickled):
            raise InvalidTask(
                f"its {what} cannot go into {python}, which is Python {version}: a function or class that is defined "
                f"in the program that submits travels as bytecode of Python {own}. What can: a function as text, "
                'Source("def ..."), or by its import path, Module("package.module:function"), from a module that is '
                "installed there, or lies in the working directory; and arguments of plain data.",
                field=what if what == "function" else "args",
            )
