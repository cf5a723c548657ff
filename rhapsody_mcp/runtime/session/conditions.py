"""Decides whether the conditions of tasks hold, each condition once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import msgspec

from rhapsody_mcp.model.errors import InvalidTask, RhapsodyError
from rhapsody_mcp.model.outcome import Outcome, canceled, failed
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Value, load_json
from rhapsody_mcp.runtime.serialization import Module
from rhapsody_mcp.runtime.tasks import ComputeTask, Condition, Task

__all__ = ["Conditions"]

_WHY_NOT = Module("rhapsody_mcp.engine.task.comparison:why_not")
_MAX_BYTES = 32 * 1024**2
"""The largest JSON result that is read for a condition."""


class ConditionOwner(Protocol):
    """The session, as Conditions uses it."""

    @property
    def closed(self) -> bool:
        """Whether the session starts no further work."""

    async def run_hidden(self, task: Task) -> Task:
        """Run an internal task and return it when it has ended."""

    def is_ready(self, task: Task) -> bool:
        """Whether the task has everything that it needs, and no backend has it."""

    def queue(self, tasks: Sequence[Task]) -> None:
        """Submit ready tasks to their backends."""

    def end(self, task: Task, outcome: Outcome) -> None:
        """Give a task its final state."""

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run the coroutine in the background; closing the session waits for its end."""


class _Verdict(NamedTuple):
    """Why a task does not run; no cause where the condition holds."""

    cause: Cause | None = None
    text: str = ""


class Conditions:
    """The conditions of one session. The tasks of a for_each share a condition."""

    def __init__(self, owner: ConditionOwner) -> None:
        self._owner = owner
        self._verdicts: WeakKeyDictionary[Condition, tuple[Outcome | None, _Verdict]] = WeakKeyDictionary()
        """With the outcome of the source that each verdict is about."""
        self._undecided: dict[Condition, list[Task]] = {}

    def lets_run(self, task: Task) -> bool:
        """Whether the task runs now. Otherwise it has ended, or is queued again once its condition is decided."""
        condition = task.when
        if condition is None:
            return True
        outcome = condition.source.outcome if condition.source else None
        decided = self._verdicts.get(condition)
        if decided is None or decided[0] is not outcome:
            if condition in self._undecided:
                self._undecided[condition].append(task)
                return False
            value = outcome.value if outcome else None
            if value is not None and (value.format != "json" or value.file):
                self._undecided[condition] = [task]
                self._owner.spawn(self._decide(condition, value, outcome))
                return False
            decided = self._verdicts[condition] = outcome, _compare(condition, value)
        return self._apply(task, decided[1])

    def _apply(self, task: Task, verdict: _Verdict) -> bool:
        if verdict.cause is Cause.SKIPPED:
            self._owner.end(task, canceled(Cause.SKIPPED, verdict.text))
        elif verdict.cause is not None:
            self._owner.end(task, failed(verdict.cause, verdict.text))
        return verdict.cause is None

    async def _decide(self, condition: Condition, value: Value, outcome: Outcome | None) -> None:
        try:
            verdict = await (self._by_worker(condition) if value.format != "json" else _read(condition, value))
            self._verdicts[condition] = outcome, verdict
        except (RhapsodyError, OSError) as error:  # no verdict on the result: the tasks can run again
            verdict = _Verdict(Cause.INVALID, f"when: {error}")
        undecided = dict.fromkeys(self._undecided.pop(condition))  # one that was canceled and runs again is there twice
        tasks = [task for task in undecided if self._owner.is_ready(task)]
        if verdict.cause is Cause.INVALID:
            for task in tasks:
                self._apply(task, verdict)
        elif not self._owner.closed:
            self._owner.queue(tasks)

    async def _by_worker(self, condition: Condition) -> _Verdict:
        """The verdict on a Python object, which only a worker may open."""
        args = (condition.source, condition.path, msgspec.json.encode(condition.comparison))
        task = await self._owner.run_hidden(ComputeTask(_WHY_NOT, args=args, retries=2, retry_delay_s=0.0))
        if task.state is not TaskState.DONE or task.outcome is None or task.outcome.value is None:
            raise InvalidTask(task.outcome.error if task.outcome else "nothing came back")
        answer = load_json(task.outcome.value)
        if "why" in answer:
            return _verdict(condition, answer["why"])
        return _wrong(condition, InvalidTask(answer["error"], field=answer["field"]))


async def _read(condition: Condition, value: Value) -> _Verdict:
    if value.size > _MAX_BYTES:
        raise InvalidTask(
            f"the result of {condition.subject} has {value.size:,} bytes, and a condition reads up to {_MAX_BYTES:,}; "
            "let a task return what is compared by itself."
        )
    return await asyncio.to_thread(_compare, condition, value)


def _compare(condition: Condition, value: Value | None) -> _Verdict:
    comparison, source = condition.comparison, condition.source
    if source is not None and value is None:
        holds = comparison.exists is False or comparison.equals is None
        return _verdict(condition, "" if holds else "is not there")
    try:
        plain = condition.value if source is None or value is None else load_json(value)
        return _verdict(condition, comparison.why_not(plain, condition.path))
    except InvalidTask as error:
        return _wrong(condition, error)


def _verdict(condition: Condition, why_not: str) -> _Verdict:
    if not why_not:
        return _Verdict()
    return _Verdict(Cause.SKIPPED, f"its condition does not hold: {condition.subject} {why_not}")


def _wrong(condition: Condition, error: InvalidTask) -> _Verdict:
    subject = f"in {condition.subject.removesuffix(condition.path)}," if error.field == "path" else condition.subject
    return _Verdict(Cause.INVALID, f"when: {subject} {error}")
