"""Chooses the backend of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rhapsody_mcp.backends.base import Backend, Kind
from rhapsody_mcp.model.errors import InvalidTask, UnknownName

__all__ = ["NoBackend", "route"]


class NoBackend(InvalidTask):
    """No backend of the session runs tasks of this `kind`."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message, field="backend")
        self.kind = kind


def route(kind: Kind | Literal["for_each"], backend: str | None, backends: Mapping[str, Backend]) -> str:
    """The name of the backend for a task of this kind: `backend`, or else the first backend that runs this kind.

    Raises UnknownName, NoBackend, or InvalidTask where `backend` does not run this kind.
    """
    if backend is not None and backend not in backends:
        raise UnknownName("backend", backend, backends)
    able = [name for name, candidate in backends.items() if kind in candidate.kinds]
    if not able:
        raise NoBackend(f"no backend of this session runs a {kind} ({', '.join(backends) or 'it has none'}).", kind)
    if backend is None:
        return able[0]
    if backend not in able:
        raise InvalidTask(f"backend {backend!r} runs no {kind}. Valid: {', '.join(able)}.", field="backend")
    return backend
