"""Runs a ForEach: makes the children when the items are available, and joins the results of the children."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rhapsody_mcp.model.errors import InvalidTask, LimitExceeded, RhapsodyError
from rhapsody_mcp.model.outcome import Outcome, TaskFailed, failed
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Value
from rhapsody_mcp.runtime.dataflow.for_each_values import join, list_with_files, outcome_of, read_items
from rhapsody_mcp.runtime.serialization import Module
from rhapsody_mcp.runtime.tasks import ComputeTask, ForEach, Part, Task

__all__ = ["ForEachRunner"]

_WORKER_READS_S = 1.0
_AS_LIST = Module("rhapsody_mcp.engine.views.inspection:as_list")


class ForEachOwner(Protocol):
    """The session, as a ForEachRunner uses it."""

    @property
    def folder(self) -> Path:
        """The folder of long results."""

    @property
    def closed(self) -> bool:
        """Whether the session starts no further work."""

    async def run_hidden(self, task: Task) -> Task:
        """Run an internal task and return it when it has ended."""

    async def submit_children(self, parent: ForEach, items: Sequence[Any]) -> None:
        """Make and submit the children. Raises InvalidTask and LimitExceeded."""

    def end(self, task: Task, outcome: Outcome) -> None:
        """Give a task its final state."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the coroutine in the background; closing the session waits for its end."""


class ForEachRunner:
    """Runs every ForEach of one session. A joined result has at most `max_bytes` encoded bytes; None is no limit."""

    def __init__(self, owner: ForEachOwner, max_bytes: int | None) -> None:
        self._owner, self._max_bytes = owner, max_bytes
        self._unfinished: dict[str, int] = {}
        self._expansions: dict[str, asyncio.Task[None]] = {}
        self._runs: defaultdict[str, int] = defaultdict(int)
        """How often each ForEach was begun: one that was canceled may run again while its items are read, or its
        results are put together."""

    def has_open_children(self, parent: ForEach) -> bool:
        return bool(self._unfinished.get(parent.uid))

    def start(self, parent: ForEach) -> None:
        """Make the children; the items are available now."""
        self._runs[parent.uid] += 1
        self._expansions[parent.uid] = self._owner.spawn(self._expand(parent))

    def watch(self, parent: ForEach) -> None:
        """Join the results of the children when the last child ends."""
        parent.state = TaskState.QUEUED
        self._runs[parent.uid] += 1
        self.count(parent)
        if not self._unfinished[parent.uid]:
            self._owner.spawn(self._join(parent))

    def count(self, parent: Task) -> None:
        """Count the children that have not ended."""
        assert isinstance(parent, ForEach), "no other task has children"
        self._unfinished[parent.uid] = sum(not child.state.final for child in parent.children)

    def child_has_ended(self, parent: Task) -> None:
        assert isinstance(parent, ForEach), "no other task has children"
        self._unfinished[parent.uid] -= 1
        if not self._unfinished[parent.uid] and not self._owner.closed:
            self._owner.spawn(self._join(parent))

    async def wait_expanded(self, tasks: Iterable[Task]) -> None:
        """Return when each ForEach among the tasks whose items are an available JSON result has its children."""
        sources = {task.uid: task.source.task for task in tasks if isinstance(task, ForEach) and task.source}
        values = {uid: source.outcome.value for uid, source in sources.items() if source.outcome}
        expansions = [
            self._expansions[uid] for uid, value in values.items() if uid in self._expansions and _is_json(value)
        ]
        if expansions:
            await asyncio.wait(expansions)
        by_workers = [self._expansions[uid] for uid, value in values.items() if value and uid in self._expansions]
        if by_workers:  # a worker that is free reads the items in milliseconds
            await asyncio.wait(by_workers, timeout=_WORKER_READS_S)

    async def _expand(self, parent: ForEach) -> None:
        run = self._runs[parent.uid]
        try:
            items = await self._read_items(parent)
            if self._runs[parent.uid] == run:
                await self._owner.submit_children(parent, items)
        except (RhapsodyError, OSError) as error:
            if self._runs[parent.uid] == run:
                parent.children = []
                self._owner.end(parent, failed(Cause.INVALID, str(error)))
        finally:
            if self._expansions.get(parent.uid) is asyncio.current_task():
                del self._expansions[parent.uid]

    async def _read_items(self, parent: ForEach) -> Sequence[Any]:
        source = parent.source
        assert source is not None, "the children of a list are made at once"
        value = source.task.outcome.value if source.task.outcome else None
        if value is None or value.format == "json":
            return await read_items(source)
        if isinstance(source.task, ForEach) and value.format == "files" and not source.path:
            return [Part(child) for child in source.task.children]
        list_task = await self._owner.run_hidden(ComputeTask(_AS_LIST, args=(source,)))
        if list_task.state is not TaskState.DONE or list_task.outcome is None or list_task.outcome.value is None:
            raise InvalidTask(
                f"for_each needs a list: {list_task.outcome.error if list_task.outcome else 'nothing came back'}",
                field="for_each",
            )
        if list_task.outcome.value.format == "json":
            return await read_items(Part(list_task))
        return [Part(list_task, f"/{number}") for number in range(list_task.outcome.value.length or 0)]

    async def _join(self, parent: ForEach) -> None:
        run = self._runs[parent.uid]
        try:
            outcome = outcome_of(parent, await self._join_results(parent))
        except (RhapsodyError, OSError) as error:
            cause = Cause.ERROR if isinstance(error, LimitExceeded | TaskFailed) else Cause.LOST
            outcome = failed(cause, f"its results cannot be put together: {error}")
        if self._runs[parent.uid] == run:
            parent.return_value = [child.return_value for child in parent.children]
            self._owner.end(parent, outcome)

    async def _join_results(self, parent: ForEach) -> Value | None:
        """The list of the results. JSON results and files are joined in this process, other objects by a worker."""
        done_children = [child if child.state is TaskState.DONE else None for child in parent.children]
        values = [child.outcome.value if child and child.outcome else None for child in done_children]
        if all(value is None or value.format == "json" for value in values):
            return await join(values, self._owner.folder, self._max_bytes)
        if any(value is not None and value.format == "files" for value in values):
            return await list_with_files(values, self._owner.folder, self._max_bytes)
        join_task = await self._owner.run_hidden(ComputeTask(Module("builtins:list"), args=(done_children,)))
        await join_task
        return join_task.outcome.value if join_task.outcome else None


def _is_json(value: Value | None) -> bool:
    return value is not None and value.format == "json"
