"""Keeps what a pilot could not report in a file of the session, for the service that comes next."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.backends.base import Returned
from rhapsody_mcp.backends.pilot.messages import Body, Events
from rhapsody_mcp.backends.pilot.private_files import write_private
from rhapsody_mcp.model.errors import BackendUnavailable

__all__ = ["SavedEvents", "has_events", "save_events"]

_EVENTS = "pilot-events"
"""A folder of its own in the session's folder, which may hold many results."""


def has_events(folder: Path) -> bool:
    """Whether pilots of a session with this folder have left events that no service has recorded."""
    return bool(_files(folder))


def _files(folder: Path) -> list[Path]:
    return sorted((folder / _EVENTS).glob("*.events"))


def save_events(folder: Path, life: str, messages: Sequence[Body]) -> Path | None:
    """Write the events among the messages into a file of the folder, where this node can see the folder; `life` is the
    name of this pilot. Tasks that were returned need no event: a task without one is returned."""
    kept = [_without_returned(message) for message in messages if isinstance(message, Events)]
    events = [message for message in kept if message.events]
    if not events:
        return None
    file = folder / _EVENTS / f"{life}.events"
    with suppress(BackendUnavailable, OSError):
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write_private(file, msgspec.msgpack.encode(events))
    return file


def _without_returned(message: Events) -> Events:
    pairs = zip(message.events, message.attempts, strict=True)
    kept = [pair for pair in pairs if not isinstance(pair[0], Returned)]
    return Events(message.backend, [event for event, _ in kept], [attempt for _, attempt in kept])


class SavedEvents:
    """The reader of what pilots have left. Each file is read once, and deleted once its events are recorded elsewhere,
    if `may_delete` still says so then."""

    def __init__(self, may_delete: Callable[[], bool]) -> None:
        self._may_delete = may_delete
        self._read = set[Path]()
        self._recording = set[asyncio.Task[None]]()

    def take(self, folder: Path, receive: Callable[[Events], Awaitable[None] | None]) -> bool:
        """Hand each message to `receive`, whose answer is done once its events are recorded; say whether a file was
        new."""
        new = [file for file in _files(folder) if file not in self._read]
        for file in new:
            self._read.add(file)
            recorded = [done for events in _load(file) if (done := receive(events)) is not None]
            self._recording.add(recording := asyncio.create_task(self._delete(file, recorded)))
            recording.add_done_callback(self._recording.discard)
        return bool(new)

    async def _delete(self, file: Path, recorded: Sequence[Awaitable[None]]) -> None:
        await asyncio.gather(*recorded)
        if self._may_delete():
            with suppress(OSError):
                os.unlink(file)


def _load(file: Path) -> list[Events]:
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.msgpack.decode(file.read_bytes(), type=list[Events])
    return []
