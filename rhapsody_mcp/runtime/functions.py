"""The functions that are registered in a session, each checked on a worker first."""

from __future__ import annotations

import asyncio
import re
import sys

import msgspec
from msgspec import to_builtins

from rhapsody_mcp.model.errors import BackendError, BackendUnavailable, InvalidTask, SessionClosed, nearest
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import load_json
from rhapsody_mcp.runtime.serialization import Module, Source
from rhapsody_mcp.runtime.session.session import Session
from rhapsody_mcp.runtime.tasks import ComputeTask

__all__ = ["FunctionRegistry", "RegisteredFunction"]

_NAME = re.compile(r"[\w.-]{1,64}")
_CHECK = Module("rhapsody_mcp.engine.task.import_check:check")


class RegisteredFunction(msgspec.Struct, frozen=True):
    """A function with a name that tasks use in place of its source. `number` counts registrations, from 1."""

    number: int
    name: str
    source: Source
    signature: str
    docstring: str


class FunctionRegistry:
    """The registered functions of one session. The latest registration of a name replaces earlier ones."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._by_name: dict[str, RegisteredFunction] = {}
        self._by_number: dict[int, RegisteredFunction] = {}
        self._last_number = 0

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def add(self, function: RegisteredFunction) -> None:
        """Give the function its name. An earlier function of this name is still found by its number."""
        self._by_name.pop(function.name, None)
        self._by_name[function.name] = self._by_number[function.number] = function
        self._last_number = max(self._last_number, function.number)

    def source(self, name: str) -> Source:
        """The source of a function. Raises what `get` raises."""
        return self.get(name).source

    def by_number(self, number: int) -> RegisteredFunction:
        """The function with this number. Raises KeyError."""
        return self._by_number[number]

    def get(self, name: str) -> RegisteredFunction:
        """The latest function of this name. Raises InvalidTask, which lists the registered names."""
        if (function := self._by_name.get(name)) is None:
            known = f" Registered: {', '.join(self.names)}." if self._by_name else ""
            raise InvalidTask(
                f"no function is registered as {name!r}{nearest(name, self.names)}.{known} Call register_function "
                'first, or write an import path, "package.module:function".'
            )
        return function

    async def check(self, source: Source, name: str | None, timeout_s: float) -> RegisteredFunction:
        """The function for `add`, once a worker has executed the source and found every module that it imports.

        Raises InvalidTask where the source cannot run on a worker, BackendError where no worker was free in time,
        BackendUnavailable where the engine ended, and SessionClosed.
        """
        function = RegisteredFunction(0, name or source.function_name, source, source.signature, source.docstring)
        if not _NAME.fullmatch(function.name):
            raise InvalidTask(
                f"name is {function.name[:80]!r}; valid are letters, digits, '_', '.' and '-', at most 64.",
                field="name",
            )
        problems = await self._problems(source, timeout_s)
        if problems:
            where = self._session.software.python or sys.prefix
            raise InvalidTask(
                f"{source.function_name} cannot run on the workers: {'; '.join(problems)}. Valid is what runs in the "
                f"Python environment of this session ({where}): do without what is missing, submit the source with the "
                "task, which then may have packages, or open a session with packages or python in environment."
            )
        self._last_number += 1
        return msgspec.structs.replace(function, number=self._last_number)

    async def _problems(self, source: Source, timeout_s: float) -> list[str]:
        task = ComputeTask(
            _CHECK,
            args=[source.text, source.function_name],
            name=source.function_name,
            task_backend_specific_kwargs=to_builtins(self._session.software),
        )
        try:
            async with asyncio.timeout(timeout_s):
                await self._session.run_hidden(task)
        except TimeoutError:
            raise _too_slow(task, timeout_s) from None
        if task.state is not TaskState.DONE or task.outcome is None or task.outcome.value is None:
            raise _not_checked(task)
        return msgspec.convert(load_json(task.outcome.value), list[str])


def _too_slow(task: ComputeTask, timeout_s: float) -> Exception:
    if task.started is None:
        return BackendError(
            f"no worker of backend {task.backend!r} was free to check the function within {timeout_s:g} s. Nothing is "
            "registered; register it once fewer tasks are running there (wait_tasks, list_tasks)."
        )
    return InvalidTask(
        f"its check did not end within {timeout_s:g} s: importing its modules, or running its top level, takes longer. "
        "Valid is a source whose top level only imports and defines; do long work inside the function."
    )


def _not_checked(task: ComputeTask) -> Exception:
    error = task.outcome.error if task.outcome else ""
    if task.state is TaskState.CANCELED:
        return SessionClosed(f"the function could not be checked: {error}.")
    if task.cause in (Cause.LOST, Cause.INVALID):
        return BackendUnavailable(f"the function could not be checked: {error}")
    return InvalidTask(
        f"importing its modules, or running its top level, ended the worker ({task.cause}: {error}). "
        "Valid is a source whose top level only imports and defines."
    )
