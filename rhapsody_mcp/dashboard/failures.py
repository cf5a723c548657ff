"""The failures of a session, grouped by cause as its tasks end."""

from __future__ import annotations

from typing import Any

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.runtime.tasks import Task, name_of
from rhapsody_mcp.runtime.tasks.failures import failure_key, failure_place, is_failure

__all__ = ["Failures"]

_TASKS_SHOWN = 20
_GROUPS_SHOWN = 50
_ERROR_CHARS, _TRACE_CHARS = 2000, 20_000


class Failures:
    """Tasks that ended FAILED or CANCELED, without skipped ones, in groups whose errors differ only in numbers."""

    def __init__(self) -> None:
        self._groups: dict[tuple[bool, str, str], list[Task]] = {}
        self._counts: dict[tuple[bool, str, str], int] = {}

    def add(self, task: Task) -> None:
        outcome = task.outcome
        if outcome is None or not is_failure(outcome):
            return
        key = failure_key(outcome)
        first = self._groups.setdefault(key, [])
        if len(first) < _TASKS_SHOWN:
            first.append(task)
        self._counts[key] = self._counts.get(key, 0) + 1

    @property
    def left_out(self) -> int:
        """How many groups `describe` leaves out."""
        return max(0, len(self._groups) - _GROUPS_SHOWN)

    def describe(self) -> list[dict[str, Any]]:
        """The groups: FAILED before CANCELED, then the largest first, then the newest. The error and the traceback are
        those of the first task."""
        newest_first = reversed(self._groups)
        keys = sorted(newest_first, key=lambda key: (key[0], -self._counts[key]))[:_GROUPS_SHOWN]
        return [_described(self._groups[key], self._counts[key]) for key in keys]


def _described(tasks: list[Task], count: int) -> dict[str, Any]:
    outcome = tasks[0].outcome
    assert isinstance(outcome, Outcome)
    return {
        "state": outcome.state.value,
        "cause": str(outcome.cause),
        "error": outcome.error[:_ERROR_CHARS],
        "place": failure_place(outcome),
        "traceback": outcome.traceback[-_TRACE_CHARS:],
        "count": count,
        "tasks": [{"uid": task.uid, "name": name_of(task)} for task in tasks],
    }
