"""The tasks that wait until an environment with their packages is made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from msgspec.structs import replace

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.specs import Software, TaskSpec
from rhapsody_mcp.runtime.package_cache import PackageCache
from rhapsody_mcp.runtime.tasks import Task

__all__ = ["Preparation"]

GoOn = Callable[[Sequence[Task], Software | None, str], None]
"""Goes on with tasks, with the software that they have now; without it, ends them with the error."""
Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]
_HELD_UNTIL = "its packages are installed"


class Preparation:
    """Makes each environment once, however many tasks of a session wait for it."""

    def __init__(self, cache: PackageCache) -> None:
        self._cache = cache
        self._waiting: dict[Software, dict[str, Task]] = {}
        self._making: dict[Software, asyncio.Task[None]] = {}

    def is_needed(self, spec: TaskSpec) -> bool:
        return bool(spec.layout.software.packages)

    def hold(self, task: Task, spec: TaskSpec, go_on: GoOn, spawn: Spawn) -> None:
        """Keep the task until its environment is made."""
        software = spec.layout.software
        task.held_until = _HELD_UNTIL
        self._waiting.setdefault(software, {})[task.uid] = task
        if software not in self._making:
            self._making[software] = spawn(self._make(software, go_on))

    def drop(self, task: Task) -> bool:
        """Whether the task was waiting, which it does no longer. What nobody waits for is not made."""
        for software, tasks in self._waiting.items():
            if tasks.pop(task.uid, None) is not None:
                task.held_until = ""
                if not tasks:
                    del self._waiting[software]
                    self._making.pop(software).cancel()
                return True
        return False

    async def _make(self, software: Software, go_on: GoOn) -> None:
        made, error = None, ""
        try:
            python = await self._cache.make(software.python, software.packages)
            made = replace(software, python=python, packages=())
        except InvalidTask as refusal:
            error = str(refusal)
        del self._making[software]
        tasks = list(self._waiting.pop(software).values())
        for task in tasks:
            task.held_until = ""
        go_on(tasks, made, error)
