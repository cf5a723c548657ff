"""Writes the script that repeats a session, and the provenance record of its results."""

from __future__ import annotations

import asyncio
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.runtime.backend_factory import plan_backends
from rhapsody_mcp.runtime.export.provenance import add_digests, describe_provenance
from rhapsody_mcp.runtime.export.script import Script, write_script
from rhapsody_mcp.runtime.open_session import OpenSession
from rhapsody_mcp.runtime.policy import Policy
from rhapsody_mcp.settings import Settings

__all__ = ["ExportedFiles", "export"]


class ExportedFiles(msgspec.Struct, frozen=True):
    """The two exported files, which only their owner can read."""

    script: Script
    script_file: Path
    provenance_file: Path


async def export(
    opened: OpenSession, settings: Settings, state_folder: Path, folder: str | None = None
) -> ExportedFiles:
    """Write the script and the provenance record of the session as it is now. No file is overwritten.

    The default folder is `exports` in the state folder. Raises InvalidRequest where the folder cannot be written.
    """
    target = _target_folder(folder, state_folder)
    if folder is not None:
        Policy.of(settings).check_folder("folder", target)
    session = opened.session
    plans = plan_backends(opened.config, settings)
    record = describe_provenance(opened.id, session.tasks, session.backends, session.software)
    script = await asyncio.to_thread(
        write_script, opened.id, session.tasks, session.backends, plans, opened.cwd, session.software
    )
    try:
        files = await asyncio.to_thread(_write, target, opened.id, script, record)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(
            f"folder {target} cannot be written: {why}. Give another folder.", field="folder"
        ) from error
    return ExportedFiles(script, *files)


def _target_folder(requested: str | None, state_folder: Path) -> Path:
    folder = state_folder / "exports" if requested is None else Path(os.path.expanduser(requested))
    if not folder.is_absolute():
        raise InvalidRequest(
            f"folder is {requested!r}; valid is an absolute path, as in '/home/me/runs'.", field="folder"
        )
    return folder


def _write(folder: Path, id: str, script: Script, record: dict[str, Any]) -> tuple[Path, Path]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    script_file = _write_new(folder, f"{id}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}", script.text.encode())
    add_digests(record)
    digest = hashlib.sha256(script.text.encode()).hexdigest()
    record = {"script": script_file.name, "script_sha256": digest, "tasks_left_out": script.left_out, **record}
    provenance_file = script_file.with_suffix(".provenance.json")
    _create(provenance_file, _record_text(record))
    return script_file, provenance_file


def _record_text(record: dict[str, Any]) -> bytes:
    """The record as JSON, with each task on a line."""
    head = {name: value for name, value in record.items() if name != "tasks"}
    lines = b",\n".join(b"  " + msgspec.json.encode(task) for task in record["tasks"])
    text = msgspec.json.format(msgspec.json.encode(head), indent=1)
    return text.removesuffix(b"\n}") + b',\n "tasks": [\n' + lines + b"\n ]\n}\n"


def _write_new(folder: Path, name: str, data: bytes) -> Path:
    """Write the first of NAME.py, NAME-2.py, ... that does not exist yet, and return its path."""
    number = 1
    while True:
        file = folder / f"{name}{f'-{number}' if number > 1 else ''}.py"
        try:
            _create(file, data)
            return file
        except FileExistsError:
            number += 1


def _create(file: Path, data: bytes) -> None:
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(data)
