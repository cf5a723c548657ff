"""Writes files that only this user can read."""

from __future__ import annotations

import os
from pathlib import Path

from rhapsody_mcp.model.errors import BackendUnavailable

__all__ = ["write_private"]


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only this user can read. Raises BackendUnavailable, with the old file as it was."""
    part = path.with_suffix(".part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
        part.rename(path)
    except OSError as error:
        raise BackendUnavailable(f"{path} cannot be written: {error.strerror}") from error
