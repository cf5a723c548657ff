"""Keeps what a pilot could not report in a file of the session, for the service that comes next."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from rhapsody_mcp.backends.pilot.messages import Body, Events
from rhapsody_mcp.backends.pilot.private_files import write_private
from rhapsody_mcp.model.errors import BackendUnavailable

__all__ = ["forget_events", "has_events", "load_events", "save_events"]

_NAME = "pilot.events"


def save_events(folder: Path, messages: Sequence[Body]) -> None:
    """Write the events among the messages into the folder, after those of an earlier pilot, where this node can see the
    folder."""
    if events := [message for message in messages if isinstance(message, Events)]:
        with suppress(BackendUnavailable):
            write_private(folder / _NAME, msgspec.msgpack.encode([*load_events(folder), *events]))


def has_events(folder: Path) -> bool:
    """Whether a pilot has left events that no service has recorded."""
    return (folder / _NAME).exists()


def load_events(folder: Path) -> list[Events]:
    """Return the events of the folder's file; none where there is no file."""
    with suppress(OSError, msgspec.DecodeError):
        return msgspec.msgpack.decode((folder / _NAME).read_bytes(), type=list[Events])
    return []


def forget_events(folder: Path) -> None:
    """Delete the folder's file, whose events are on the disk elsewhere."""
    with suppress(OSError):
        (folder / _NAME).unlink()
