"""Which tasks a call of `wait_tasks` waits for, and which of their ends an earlier reply has shown."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.tasks import ForEach, Task, leaves, name_of, with_children
from rhapsody_mcp.toolsets.replies.formatting import limited_list
from rhapsody_mcp.toolsets.waiting.patience import patience_of

__all__ = ["SelectedTasks", "State", "WaitFilter", "has_children", "select_tasks"]

State = Literal["open", "WAITING", "QUEUED", "RUNNING", "DONE", "FAILED", "CANCELED"]
_OPEN = ("open", "WAITING", "QUEUED", "RUNNING")
_NAMES_SHOWN = 5


class WaitFilter(NamedTuple):
    """The tasks and the state that a wait is for; `uids` is None for every task."""

    uids: frozenset[str] | None
    state: State | None

    def shows(self, task: Task) -> bool:
        """Whether a reply to a wait with this filter shows the end of this task."""
        uids = {task.uid} if task.parent is None else {task.uid, task.parent.uid}
        return (self.uids is None or bool(uids & self.uids)) and self.state in (None, task.state.value)

    def key(self, session: str) -> str:
        uids = None if self.uids is None else sorted(self.uids)
        return f"{zlib.crc32(repr((session, uids, self.state)).encode()) & 0xFFFF:04x}"


_filters: WeakKeyDictionary[OpenSession, dict[str, WaitFilter]] = WeakKeyDictionary()
"""The filters of earlier waits for each session, by the keys in the cursors of their replies."""


class SelectedTasks:
    """The tasks that a wait is for. `since` is how many tasks of the session had ended at the cursor, `counted_from`
    how many where the count of others begins: at the cursor, else at the call, or at one before that was given up.

    A for_each among `tasks` stands for all its children. `awaited` are the tasks themselves or, where the selection is
    by state, the tasks that were in that state at the selection or have ended since the cursor. `until` are the tasks
    that must have ended: a for_each ends after its children, once its result is put together. `earlier` is the filter
    that the cursor belongs to, where that is another one, and `note` says so.
    """

    def __init__(
        self,
        open_session: OpenSession,
        tasks: list[Task],
        state: State | None,
        since: int | None,
        key: str,
        names: Sequence[str] | None,
        earlier: WaitFilter | None = None,
        note: str = "",
        counted_from: int | None = None,
    ) -> None:
        self.open_session, self.tasks, self.state, self.since = open_session, tasks, state, since or 0
        self.names, self.earlier, self.note, self._key = names, earlier, note, key
        self.counted_from = self.since if counted_from is None else counted_from
        self.patience = patience_of(open_session)
        self.awaited = self.until = tasks
        if state is not None:
            ended = () if since is None or state not in _OPEN else open_session.session.ended[since:]
            uids = {task.uid for task in ended}
            self.awaited = [task for task in _with_gathering(tasks) if _is_in(task, state) or task.uid in uids]
            parents = {task.parent.uid: task.parent for task in self.awaited if task.parent is not None}
            self.until = [*self.awaited, *parents.values()] if state in _OPEN else self.awaited
        self._uids = {task.uid for task in self.awaited}
        self._rows = {task.uid for task in tasks}

    def __contains__(self, task: Task) -> bool:
        return task.uid in self._uids or (task.parent is not None and task.parent.uid in self._uids)

    def row_of(self, task: Task) -> Task:
        """The for_each whose row shows the task, or the task itself."""
        return task.parent if task.parent is not None and task.parent.uid in self._rows else task

    def ended(self, since: int) -> Iterator[tuple[int, Task]]:
        """The awaited tasks that ended after the first `since` tasks of the session, each with its position in the
        order of ends."""
        ended = self.open_session.session.ended
        if len(self.awaited) < len(ended) - since and self._size < len(ended) - since:
            awaited = {task.uid: task for task in with_children(self.awaited)}.values()
            yield from sorted((at, task) for task in awaited if (at := task.position) is not None and at >= since)
            return
        for position, task in enumerate(ended[since:], since):
            if task.position == position and task in self:  # else it ran again since
                yield position, task

    def news(self) -> list[tuple[int, Task]]:
        """The awaited tasks whose end no earlier reply has shown."""
        if (earlier := self.earlier) is None:
            return list(self.ended(self.since))
        return [(at, task) for at, task in self.ended(0) if at >= self.since or not earlier.shows(task)]

    @property
    def _size(self) -> int:
        return sum(1 + len(task.children) if isinstance(task, ForEach) else 1 for task in self.awaited)

    def noting_end(self, *, is_deferred: bool) -> AbstractContextManager[None]:
        """A context for the wait, from whose end is learned what its client lets it do."""
        return self.patience.noting_end(self._key, self.counted_from, is_deferred=is_deferred)

    def cursor(self, position: int) -> str:
        return f"{position}.{self._key}"


def select_tasks(
    open_session: OpenSession,
    names: Sequence[str] | None,
    state: State | None,
    cursor: str | None,
) -> SelectedTasks:
    """Raises UnknownName for a name, and InvalidRequest for a text that is no cursor of a reply.

    With the cursor of another filter, ends that its replies have shown are not shown again; where that filter is not
    known any more, every end is shown. Without a cursor, the wait goes on from one that the client gave up.
    """
    current = (task for task in open_session.session.tasks if task.replaced_by is None)
    tasks = list(current) if names is None else open_session.tasks(names)
    uids = None if names is None else frozenset(task.uid for task in tasks)
    key = (wait_filter := WaitFilter(uids, state)).key(open_session.id)
    filters = _filters.setdefault(open_session, {})
    filters[key] = wait_filter
    if cursor is None:
        unseen = patience_of(open_session).unseen(key)
        begins = len(open_session.session.ended) if unseen is None else unseen
        since = unseen if state in _OPEN else None
        return SelectedTasks(open_session, tasks, state, since, key, names, counted_from=begins)
    since, cursor_key = _parse_cursor(open_session, cursor)
    if cursor_key == key:
        return SelectedTasks(open_session, tasks, state, since, key, names)
    if (earlier := filters.get(cursor_key)) is None:
        return SelectedTasks(open_session, tasks, state, 0, key, names, note=_UNKNOWN_FILTER)
    return SelectedTasks(open_session, tasks, state, since, key, names, earlier, _other_filter(open_session, earlier))


_UNKNOWN_FILTER = "the cursor belongs to a wait for other tasks, which is not known here: everything is shown"


def _other_filter(open_session: OpenSession, earlier: WaitFilter) -> str:
    names = [name_of(open_session.by_uid(uid)) for uid in sorted(earlier.uids or ())]
    which = "every task" if earlier.uids is None else limited_list(names, _NAMES_SHOWN)
    state = "" if earlier.state is None else f" in state {earlier.state}"
    return f"the cursor belongs to a wait for {which}{state}: what that one showed is not shown again, the rest is"


def _parse_cursor(open_session: OpenSession, cursor: str) -> tuple[int, str]:
    """How many tasks had ended, and the key of the filter."""
    match = re.fullmatch(r"([0-9]{1,12})\.([0-9a-f]{4})", cursor)
    if match is None or int(match[1]) > len(open_session.session.ended):
        raise InvalidRequest(f"cursor {cursor[:64]!r} is none of this session; leave it out to see everything.")
    return int(match[1]), match[2]


def _with_gathering(tasks: Sequence[Task]) -> Iterator[Task]:
    """The leaves of the tasks, and each for_each that has still to put its result together."""
    yield from leaves(tasks)
    for task in tasks:
        if has_children(task) and not task.state.final and all(child.state.final for child in leaves([task])):
            yield task


def has_children(task: Task) -> bool:
    return isinstance(task, ForEach) and bool(task.children)


def _is_in(task: Task, state: State) -> bool:
    return not task.state.final if state == "open" else task.state.value == state
