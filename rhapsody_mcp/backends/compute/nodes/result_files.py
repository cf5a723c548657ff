"""Copies the files of results from nodes that do not see the folder of their session."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from msgspec.structs import replace

from rhapsody_mcp.backends.base import Ended, Event, Report
from rhapsody_mcp.engine.network.files import fetch_file
from rhapsody_mcp.engine.network.multiplexer import Multiplexer
from rhapsody_mcp.model.outcome import Outcome, RankOutcome
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Stream, Value

__all__ = ["ResultFiles", "delete_files"]

T = TypeVar("T", Outcome, RankOutcome)


class ResultFiles:
    """Reports the end of a task once the files of its outcome are here.

    `find_node` returns the connection of the node on which a file lies; None for a file that lies here. Where that
    connection is lost, `reconnected` waits for the next one with the same node, and says whether there is one.
    """

    def __init__(
        self,
        find_node: Callable[[str], Multiplexer | None],
        reconnected: Callable[[Multiplexer], Awaitable[bool]] | None = None,
    ) -> None:
        self._find_node, self._reconnected = find_node, reconnected
        self._copies: set[asyncio.Task[None]] = set()
        self.is_closed = False
        """Whether an end is not reported any more where its files cannot be copied."""

    def report_with(self, report: Report, folder: str) -> Report:
        """Return a report function that copies files into `folder` before it calls `report`."""

        def report_with_files(event: Event) -> None:
            if isinstance(event, Ended) and any(map(self._find_node, _files(event.outcome))):
                copy = asyncio.create_task(self._report_copied(event, report, folder))
                self._copies.add(copy)
                copy.add_done_callback(self._copies.discard)
            else:
                report(event)

        return report_with_files

    async def finish(self) -> None:
        """Wait until every end that was to be reported is reported."""
        while self._copies:
            await asyncio.wait(self._copies)

    async def _report_copied(self, event: Ended, report: Report, folder: str) -> None:
        try:
            outcome = await self._copied(event.outcome, folder)
        except OSError as error:
            if self.is_closed:
                return
            outcome = _without_files(event.outcome, f"it ended {event.outcome.state}, and its result is lost: {error}")
        report(Ended(event.uid, outcome))

    async def _copied(self, outcome: Outcome, folder: str) -> Outcome:
        ranks = [await self._with_copies(rank, folder) for rank in outcome.ranks]
        return replace(await self._with_copies(outcome, folder), ranks=tuple(ranks))

    async def _with_copies(self, outcome: T, folder: str) -> T:
        return replace(
            outcome,
            value=outcome.value and await self._value(outcome.value, folder),
            stdout=await self._stream(outcome.stdout, folder),
            stderr=await self._stream(outcome.stderr, folder),
        )

    async def _value(self, value: Value, folder: str) -> Value:
        return value.moved({path: await self._copy(path, folder) for path in value.paths}) if value.paths else value

    async def _stream(self, stream: Stream, folder: str) -> Stream:
        return stream if stream.file is None else replace(stream, file=await self._copy(stream.file, folder))

    async def _copy(self, path: str, folder: str) -> str:
        """The path of a copy here; the path itself where the file lies here."""
        while (node := self._find_node(path)) is not None:
            try:
                return await fetch_file(node, path, folder)
            except OSError:
                if self._reconnected is None or not node.lost.is_set() or not await self._reconnected(node):
                    raise
        return path


def delete_files(outcome: Outcome, folder: str) -> None:
    """Delete the files of the outcome that lie in this folder."""
    for path in _files(outcome):
        if os.path.dirname(path) == folder:
            with suppress(OSError):
                os.unlink(path)


def _files(outcome: Outcome | RankOutcome) -> list[str]:
    files = [stream.file for stream in (outcome.stdout, outcome.stderr) if stream.file is not None]
    files += outcome.value.paths if outcome.value else []
    for rank in outcome.ranks if isinstance(outcome, Outcome) else ():
        files += _files(rank)
    return files


def _without_files(outcome: Outcome, error: str) -> Outcome:
    state = TaskState.FAILED if outcome.state is TaskState.DONE else outcome.state
    cause = outcome.cause or Cause.LOST
    return Outcome(state=state, started=outcome.started, ended=outcome.ended, cause=cause, error=outcome.error or error)
