"""Makes the tasks of a call once, and checks them as a submission would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from rhapsody_mcp.model.errors import InvalidTask
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.requests.request_batch import label_of, make_tasks
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.runtime.tasks import Task, leaves
from rhapsody_mcp.toolsets.allocations import refuse_used_up
from rhapsody_mcp.toolsets.tooling.background import to_thread_if_large

__all__ = ["check_tasks", "labeled_errors", "prepare_tasks"]

SessionState = tuple[int, int, tuple[int, ...]]
"""How many tasks a session has, how many have ended, and the numbers of the functions that have a name."""


class _Prepared(NamedTuple):
    """Tasks that were made of `requests` when the session was in `state`."""

    open_session: OpenSession
    requests: Sequence[TaskRequest]
    state: SessionState
    tasks: list[Task]


_prepared: ContextVar[_Prepared | None] = ContextVar("prepared", default=None)
"""The tasks of the current call."""


async def prepare_tasks(open_session: OpenSession, requests: Sequence[TaskRequest]) -> list[Task]:
    """The tasks of these requests. A second time in the same call, the same tasks, unless the session has changed.

    The caller holds `open_session.naming_lock`. Raises what `make_tasks` and
    `refuse_used_up` raise.
    """
    state = _state_of(open_session)
    last = _prepared.get()
    if last and last.open_session is open_session and last.requests is requests and last.state == state:
        return last.tasks
    refuse_used_up(open_session)
    tasks = await to_thread_if_large(make_tasks, requests, open_session)
    _prepared.set(_Prepared(open_session, requests, state, tasks))
    return tasks


def _state_of(open_session: OpenSession) -> SessionState:
    session, functions = open_session.session, open_session.functions
    return session.task_count, len(session.ended), tuple(functions.get(name).number for name in functions.names)


def check_tasks(open_session: OpenSession, requests: Sequence[TaskRequest], tasks: Sequence[Task]) -> None:
    """Raise what the submission of these tasks would raise."""
    refuse_used_up(open_session)
    with labeled_errors(requests, tasks):
        open_session.session.accept(tasks)


@contextmanager
def labeled_errors(requests: Sequence[TaskRequest], tasks: Sequence[Task]) -> Iterator[None]:
    """Name a task that is refused by its place in the call: the task has no id before the submission."""
    try:
        yield
    except InvalidTask as error:
        for index, task in enumerate(tasks):
            if error.uid in (task.uid, *(child.uid for child in leaves([task]))):
                raise error.of_task(label_of(index, requests[index])) from error
        raise
