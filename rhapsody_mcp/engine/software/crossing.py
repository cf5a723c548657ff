"""Which functions can go from one version of Python into another."""

from __future__ import annotations

import sys

from rhapsody_mcp.engine.software.interpreter import Interpreter
from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Call, Command, Completion
from rhapsody_mcp.model.values import holds_code, version_here

__all__ = ["refuse_code"]


def refuse_code(work: Call | Command | Completion, python: Interpreter) -> None:
    """Raise InvalidTask where a function, or one of its arguments, is bytecode of this Python, and the other has
    another version."""
    if not isinstance(work, Call) or python.version == sys.version_info[:2]:
        return
    for what, pickled in (("function", work.code if work.form == "pickle" else b""), ("arguments", work.arguments)):
        if holds_code(pickled):
            raise InvalidTask(
                f"its {what} cannot go into {python.path}, which is Python {python.version_text}: a function or class "
                f"that is defined here travels as bytecode of Python {version_here()}. What can: a function as text, "
                'Source("def ..."), or by its import path, Module("package.module:function"), from a module that is '
                "installed there, or lies in the working directory; and arguments of plain data.",
                field=what if what == "function" else "args",
            )
