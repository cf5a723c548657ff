"""Our executor with the arguments of the standard ones, for the tests that come with Python."""

from __future__ import annotations

from typing import Any

from rhapsody_mcp.api import SessionExecutor
from rhapsody_mcp.backends import LocalExecutionBackend

__all__ = ["Executor"]


class Executor(SessionExecutor):
    def __init__(self, max_workers: int | None = None, mp_context: None = None, **others: Any) -> None:
        super().__init__(LocalExecutionBackend(num_workers=max_workers), **others)
