"""Keeps what a pilot could not report in a file of the session, for the service that comes next."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.backends.pilot.messages import Body, Events
from rhapsody_mcp.backends.pilot.submission import write_private
from rhapsody_mcp.model.errors import BackendUnavailable

__all__ = ["load_events", "save_events"]

_NAME = "pilot.events"


def save_events(folder: str, messages: Sequence[Body]) -> None:
    """Write the events among the messages into the folder, where this node can see it."""
    events = [message for message in messages if isinstance(message, Events)]
    if not events:
        return
    with suppress(BackendUnavailable):
        write_private(Path(folder, _NAME), msgspec.msgpack.encode(events))


def load_events(folder: str) -> list[Events]:
    """Return the events of the folder's file, and delete it; none where there is no file."""
    path = Path(folder, _NAME)
    try:
        events = msgspec.msgpack.decode(path.read_bytes(), type=list[Events])
        path.unlink()
    except (OSError, msgspec.DecodeError):
        return []
    return events
