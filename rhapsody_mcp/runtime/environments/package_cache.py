"""Environments with the packages of tasks, made once each and kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import platformdirs

from rhapsody_mcp.engine.software.interpreter import Interpreter, find_interpreter
from rhapsody_mcp.model.errors import InvalidTask

__all__ = ["PackageCache"]

_LINES_SHOWN, _CHARS_SHOWN = 6, 800


class PackageCache:
    """The environments of a folder, which several services may share.

    An environment is known by its Python and its packages: it is not made again for a newer version of a package.
    """

    def __init__(self, folder: Path | None, work_dir: str) -> None:
        """Relative paths of interpreters start in `work_dir`."""
        self._folder = folder or platformdirs.user_cache_path("rhapsody-mcp") / "environments"
        self._work_dir = work_dir

    async def make(self, python: str, packages: Sequence[str]) -> str:
        """The folder of the environment. Raises InvalidTask where it cannot be made, with what pip or uv said last.

        A canceled call ends what it has started.
        """
        folder = self._work_dir or os.getcwd()
        interpreter = await asyncio.to_thread(find_interpreter, python or sys.executable, folder)
        environment = self._folder / _key(interpreter, packages)
        if not environment.exists():
            await self._build(environment, interpreter, packages)
        return str(environment.resolve())

    async def _build(self, environment: Path, interpreter: Interpreter, packages: Sequence[str]) -> None:
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        builder = Path(__file__).with_name("environment_builder.py")
        with tempfile.TemporaryFile() as said:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", str(builder), str(environment), interpreter.path, *packages),
                env=own,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                code = await process.wait()
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            if code:
                said.seek(0)
                raise _not_made(packages, interpreter, said.read().decode("utf-8", "replace"))


def _key(interpreter: Interpreter, packages: Sequence[str]) -> str:
    named = json.dumps([os.path.realpath(interpreter.path), interpreter.path, interpreter.version, sorted(packages)])
    return f"py{interpreter.version_text}-{hashlib.sha256(named.encode()).hexdigest()[:16]}"


def _not_made(packages: Sequence[str], interpreter: Interpreter, said: str) -> InvalidTask:
    lines = [line.strip() for line in said.splitlines() if line.strip()][-_LINES_SHOWN:]
    shown = " | ".join(lines)[-_CHARS_SHOWN:].rstrip(".")
    return InvalidTask(
        f"its packages ({', '.join(packages)}) could not be installed for {interpreter.path}: "
        f"{shown}. Correct packages, or give python, an environment that has them.",
        field="packages",
    )
