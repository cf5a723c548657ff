"""The reports of closed sessions, kept for as long as sessions are."""

from __future__ import annotations

import errno
import gzip
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec

from rhapsody_mcp.dashboard.report import report_data
from rhapsody_mcp.dashboard.view import SessionView

__all__ = ["keep_report", "kept_report", "prune_reports", "write_whole"]

_FOLDER = "reports"
_NAME = re.compile(r"(.+)-\d{8}T\d{12}Z\.json\.gz")


def keep_report(state_folder: Path, view: SessionView, more: dict[str, Any]) -> None:
    """Keep the report of a session that is closed; its owner alone can read the file. Raises OSError."""
    folder = state_folder / _FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    view.catch_up_now()
    data = gzip.compress(msgspec.json.encode(report_data(view, more)), 4)
    file = folder / f"{view.name}-{datetime.now(UTC):%Y%m%dT%H%M%S%f}Z.json.gz"
    write_whole(file, data)


def write_whole(file: Path, data: bytes) -> None:
    """Write a file that its owner alone can read, in one step; a file that is there is replaced, a link leads to it.
    Raises OSError, also for what is there and is no file."""
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        code = errno.EISDIR if target.is_dir() else errno.EINVAL
        raise OSError(code, "a folder or a device is there", str(file))
    try:
        handle, draft = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}-")
    except OSError as error:
        error.filename = str(file)
        raise
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(data)
        os.replace(draft, target)
    except BaseException:
        os.unlink(draft)
        raise


def kept_report(state_folder: Path, session: str) -> dict[str, Any] | None:
    """The data of the newest report that is kept of a session with this id; None where there is none."""
    files = sorted(file for id, file in _files(state_folder) if id == session)
    return cast(dict[str, Any], msgspec.json.decode(gzip.decompress(files[-1].read_bytes()))) if files else None


def prune_reports(state_folder: Path, before: float) -> None:
    """Delete the reports from before this time, in seconds since the epoch."""
    for _, file in _files(state_folder):
        with suppress(OSError):
            if file.stat().st_mtime < before:
                file.unlink()


def _files(state_folder: Path) -> Iterator[tuple[str, Path]]:
    for file in (state_folder / _FOLDER).glob("*.json.gz"):
        if match := _NAME.fullmatch(file.name):
            yield match[1], file
