"""The tasks that wait until an environment with their packages is made."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from msgspec.structs import replace

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.model.outcome import Outcome, failed
from rhapsody_mcp.model.specs import Software, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.runtime.environments.package_cache import PackageCache
from rhapsody_mcp.runtime.tasks import Task

__all__ = ["Preparation"]

_HELD_UNTIL = "its packages are installed"


class PreparationOwner(Protocol):
    """The session, as Preparation uses it."""

    specs: dict[str, TaskSpec]
    """The specs of the tasks that have not ended."""

    def queue(self, tasks: Sequence[Task]) -> None:
        """Submit ready tasks to their backends."""

    def end(self, task: Task, outcome: Outcome) -> None:
        """Give a task its final state."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the coroutine in the background; closing the session waits for its end."""


class Preparation:
    """Makes each environment once, however many tasks of a session wait for it."""

    def __init__(self, owner: PreparationOwner, cache: PackageCache) -> None:
        self._owner, self._cache = owner, cache
        self._waiting: dict[Software, dict[str, Task]] = {}
        self._making: dict[Software, asyncio.Task[None]] = {}

    def hold(self, task: Task) -> None:
        """Let the task wait for its packages. It is queued again once they are there, and else ends."""
        software = self._owner.specs[task.uid].layout.software
        task.held_until = _HELD_UNTIL
        self._waiting.setdefault(software, {})[task.uid] = task
        if software not in self._making:
            self._making[software] = self._owner.spawn(self._make(software))

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

    async def _make(self, software: Software) -> None:
        python, error = "", ""
        try:
            python = await self._cache.make(software.python, software.packages)
        except InvalidTask as refusal:
            error = str(refusal)
        except OSError as failure:
            error = f"its packages could not be installed: {failure}."
        del self._making[software]
        tasks = list(self._waiting.pop(software).values())
        for task in tasks:
            task.held_until = ""
            if error:
                self._owner.end(task, failed(Cause.INVALID, error))
            else:
                spec = self._owner.specs[task.uid]
                prepared = replace(software, python=python, packages=())
                self._owner.specs[task.uid] = replace(spec, layout=replace(spec.layout, software=prepared))
                task.state = TaskState.WAITING
        self._owner.queue([task for task in tasks if not task.state.final])
