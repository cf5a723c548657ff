"""Starts the service, detached from whoever needs it: the end of a chat, and of its terminal, is not the service's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rhapsody_mcp.model.errors import InvalidSettings, RhapsodyError, root_of
from rhapsody_mcp.serving.daemon.connection import PATIENCE_S, ServiceUnavailable, is_readable
from rhapsody_mcp.serving.paths import Places

__all__ = ["Report", "StartCutOff", "start_service"]

_LOG_BYTES = 5_000_000
_LAST_WORDS = 2000


class Report:
    """What a service tells whoever started it: of a detached one a line of JSON on its stdout, once."""

    def __init__(self, detached: bool) -> None:
        self._detached = detached
        if detached and os.fork():
            os._exit(0)  # whoever started it shall not be its parent

    def ready(self) -> None:
        self._tell("The service is ready.", ready=True)

    def taken(self) -> None:
        self._tell("Another service runs here.", taken=True)

    def failed(self, error: Exception) -> None:
        """Also where the error is one that nobody foresaw."""
        root = root_of(error)
        words = str(root) if isinstance(root, RhapsodyError) else f"the service failed: {root!r}."
        self._tell("", error=words)

    def _tell(self, words: str, **said: Any) -> None:
        """From then on stdout is the log, where stderr goes."""
        detached, self._detached = self._detached, False
        with suppress(OSError):  # whoever started it may have left
            if detached:
                os.write(1, json.dumps(said).encode() + b"\n")
                os.dup2(2, 1)
            elif words:
                os.write(2, f"{words}\n".encode())


class StartCutOff(ServiceUnavailable):
    """The service ended without a word to whoever started it, as when somebody killed it; another start may help."""


def start_service(places: Places, config: Path | None, client: int | None = None) -> bool:
    """Returns once a service is ready: whether it is this one, or another was there first.

    Raises RhapsodyError in the words of the service where it cannot start, StartCutOff, ClientLeft.
    """
    places.make()
    options = ["--config", str(config.absolute())] if config else []
    if places.folder:
        options += ["--folder", str(places.folder.absolute())]
    with _opened(places.log) as log:
        began = log.tell()
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "rhapsody_mcp", "service", "run", "--detached", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=_home(),
            start_new_session=True,
        ) as started:
            assert started.stdout
            told = _told(started.stdout.fileno(), client)
    if not told:
        raise StartCutOff(f"the service ended as it started. {_last_words(places.log, began)}")
    if "error" in told:
        raise RhapsodyError(told["error"])
    return not told.get("taken")


def _told(report: int, client: int | None) -> dict[str, Any]:
    line, until = b"", time.monotonic() + PATIENCE_S
    while not line.endswith(b"\n"):
        if not is_readable(report, client, until):
            raise ServiceUnavailable(f"the service is not ready after {PATIENCE_S:.0f} s; it goes on starting.")
        if not (more := os.read(report, 65536)):
            return {}
        line += more
    answer: dict[str, Any] = json.loads(line)
    return answer


@contextmanager
def _opened(log: Path) -> Iterator[Any]:
    """To write to its end. A long one is put aside first."""
    try:
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        opened = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InvalidSettings(
            f"the service cannot keep its state in {log.parent}: {error.strerror}. Name another --folder, or serve "
            "without a service and its ledger: --in-process."
        ) from error
    with os.fdopen(opened, "ab") as file:
        yield file


def _last_words(log: Path, began: int) -> str:
    with log.open("rb") as file:
        file.seek(max(began, file.seek(0, os.SEEK_END) - _LAST_WORDS))
        said = file.read().decode(errors="replace").strip().splitlines()
    return f"Its last words: {said[-1]} (more in {log})" if said else f"Its log {log} says nothing of it."


def _home() -> Path:
    home = Path(os.path.expanduser("~"))
    return home if home.is_dir() else Path("/")
