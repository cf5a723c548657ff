"""Keeps what the functions of this process tell through `rhapsody_mcp.task`."""

from __future__ import annotations

import os
import time
from typing import Any

from rhapsody_mcp import task
from rhapsody_mcp.model.live.progress import Progress, advanced, progress_of

__all__ = ["ProgressNote"]


class ProgressNote:
    """The progress of the function that runs. It is also written into the file at `path`, for those who watch."""

    def __init__(self, path: str) -> None:
        os.environ[task.VARIABLE] = path
        self.told: Progress | None = None
        """What the function has told so far."""
        self.current = task.current
        self.current.tell = self._tell

    def take(self) -> Progress | None:
        """What the function has told, which is forgotten here."""
        told, self.told = self.told, None
        return told

    def _tell(self, line: dict[str, Any]) -> None:
        self.told = advanced(self.told, progress_of(line, time.time()))
