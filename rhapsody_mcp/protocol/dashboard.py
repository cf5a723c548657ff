"""Answers what the page asks: the same over HTTP and in an MCP App."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from rhapsody_mcp.dashboard.archive import kept_report
from rhapsody_mcp.dashboard.details import describe_task, matching, row_of
from rhapsody_mcp.dashboard.feed import Cursor, Feed
from rhapsody_mcp.dashboard.page_text import report_html
from rhapsody_mcp.dashboard.picture import stream_svg
from rhapsody_mcp.dashboard.report import write_report_in_steps
from rhapsody_mcp.dashboard.trace import chrome_trace
from rhapsody_mcp.dashboard.view import SessionView
from rhapsody_mcp.model.errors import InvalidRequest, UnknownName
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.model.values import is_index
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.session_registry import SessionRegistry
from rhapsody_mcp.runtime.tasks import Task, leaves
from rhapsody_mcp.toolsets.allocations import allocation_field
from rhapsody_mcp.toolsets.output.sources import ends_of_sources, sources_of

__all__ = ["FILES", "Dashboard"]

Query = Mapping[str, str]
_MOST_ROWS = 100
_BLOCK_ROWS = 100_000
_OUTPUT_BYTES = 16 * 1024
FILES = {"report": "text/html; charset=utf-8", "trace": "application/json", "picture": "image/svg+xml"}
"""The MIME type of each file that can be made of a session."""


class Dashboard:
    """Answers for the sessions of a registry; every answer is plain JSON data, and changes nothing but `cancel`."""

    def __init__(self, sessions: SessionRegistry) -> None:
        self._sessions = sessions
        self._feeds: WeakKeyDictionary[OpenSession, Feed] = WeakKeyDictionary()

    def feed(self, session: str) -> Feed:
        """The frames of a session. Raises UnknownName."""
        opened = self._sessions.get(session)
        if (feed := self._feeds.get(opened)) is None:
            more = partial(allocation_field, opened)
            feed = self._feeds[opened] = Feed(SessionView(opened.session, opened.id), more)
        return feed

    async def answer(self, what: str, query: Query) -> dict[str, Any]:
        """Raises InvalidRequest for an unknown question or a missing field, and UnknownName."""
        match what:
            case "sessions":
                rows = [{"session": opened.id, "counts": opened.session.counts} for opened in self._sessions.all()]
                return {"sessions": rows}
            case "task":
                return await self._task(query)
            case "tasks":
                return self._tasks(query)
            case "rows":
                return self._rows(query)
        raise InvalidRequest(f"{what!r} is no question. Valid: sessions, task, tasks, rows.")

    async def _task(self, query: Query) -> dict[str, Any]:
        opened = self._sessions.get(_field(query, "session"))
        task = self._at_row(query) if "row" in query else opened.by_uid(_field(query, "uid"))
        described = describe_task(task)
        if task.state is not TaskState.RUNNING:
            return described
        printed = await ends_of_sources(opened.session, sources_of(task), "tail", _OUTPUT_BYTES)
        texts = {name: {"text": one.text, "size": one.size} for name, one in printed.items() if one.text}
        return described | texts

    def _at_row(self, query: Query) -> Task:
        view, row = self.feed(_field(query, "session")).view, _number(query, "row")
        if row >= len(view.spans):
            raise UnknownName("row", str(row), (), f"0 to {len(view.spans) - 1}")
        return view.session.ended[view.spans.index[row]]

    def _tasks(self, query: Query) -> dict[str, Any]:
        opened = self._sessions.get(_field(query, "session"))
        states = [state for state in query.get("states", "").split(",") if state]
        name, tasks = query.get("name", ""), leaves(opened.session.tasks)
        found = matching(tasks, states, name) if states or name else tasks
        offset, limit = _number(query, "offset", "0"), _number(query, "limit", str(_MOST_ROWS))
        shown = found[offset : offset + min(limit, _MOST_ROWS)]
        return {"total": len(found), "tasks": [row_of(task) for task in shown]}

    def _rows(self, query: Query) -> dict[str, Any]:
        spans = self.feed(_field(query, "session")).view.spans
        first, last = _number(query, "first"), min(_number(query, "last"), len(spans))
        return spans.block(min(last, max(first, last - _BLOCK_ROWS)), last)

    async def frame(self, session: str, cursor: str, version: int) -> tuple[bytes, Cursor, int]:
        """The next frame for a page that asks for each."""
        return await self.feed(session).next_frame(Cursor.read(cursor), version)

    async def file(self, what: str, session: str) -> bytes:
        """A file of a session as it is now, or the report that is kept of a closed one. Raises UnknownName, and
        InvalidRequest for a kind that is not in FILES."""
        if what not in FILES:
            raise InvalidRequest(f"{what!r} is no kind of file. Valid: {', '.join(FILES)}.")
        try:
            opened = self._sessions.get(session)
        except UnknownName:
            kept = await asyncio.to_thread(kept_report, self._sessions.state_folder, session)
            if kept is None:
                raise
            if what != "report":
                raise InvalidRequest(f"{session} is closed; of it, only the report is kept.") from None
            return report_html(kept).encode()
        view = self.feed(session).view
        if what == "report":
            return (await write_report_in_steps(view, allocation_field(opened))).encode()
        await view.catch_up()
        return await asyncio.to_thread(chrome_trace, view) if what == "trace" else stream_svg(view).encode()

    async def cancel(self, session: str, uids: Sequence[str]) -> list[Task]:
        """Cancel these tasks, all that have not ended where none is given; returns when they have ended."""
        opened = self._sessions.get(session)
        tasks = [opened.by_uid(uid) for uid in uids] or opened.session.tasks
        open_tasks = [task for task in tasks if not task.state.final]
        await opened.session.cancel(open_tasks)
        return open_tasks


def _field(query: Query, name: str) -> str:
    if not (value := query.get(name, "")):
        raise InvalidRequest(f"{name} is missing.", field=name)
    return value


def _number(query: Query, name: str, default: str = "") -> int:
    text = query.get(name, default)
    if not is_index(text):
        raise InvalidRequest(f"{name} is {text[:40]!r}; valid is a whole number.", field=name)
    return int(text)
