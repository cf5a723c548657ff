"""Starts the service as a detached process, which survives the client and its terminal."""

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
from rhapsody_mcp.serving.daemon.connection import STARTUP_TIMEOUT_S, ServiceUnavailable, is_readable
from rhapsody_mcp.serving.paths import ServicePaths

__all__ = ["ServiceDied", "StartReport", "start_service"]

_MAX_LOG_BYTES = 5_000_000
_LOG_END_BYTES = 2000
_OF_STARTER = ("TRACEPARENT", "TRACESTATE", "BAGGAGE")
"""The trace of whoever starts the service is not that of the tasks that it will run."""


class StartReport:
    """How the start of a service went, for its starter: one line of JSON on the stdout of a detached service."""

    def __init__(self, detached: bool) -> None:
        self._detached = detached
        if detached and os.fork():
            os._exit(0)  # so that the starter is not the service's parent

    def ready(self) -> None:
        self._send("The service is ready.", ready=True)

    def already_running(self) -> None:
        self._send("Another service runs here.", taken=True)

    def failed(self, error: Exception) -> None:
        """Also for an unexpected error."""
        root = root_of(error)
        message = str(root) if isinstance(root, RhapsodyError) else f"the service failed: {root!r}."
        self._send("", error=message)

    def _send(self, text: str, **report: Any) -> None:
        """Send the first report, and redirect stdout to the log, as stderr is."""
        detached, self._detached = self._detached, False
        with suppress(OSError):  # the starter may have ended
            if detached:
                os.write(1, json.dumps(report).encode() + b"\n")
                os.dup2(2, 1)
            elif text:
                os.write(2, f"{text}\n".encode())


class ServiceDied(ServiceUnavailable):
    """The service ended without a report to its starter, as after SIGKILL. A second start may work."""


def start_service(paths: ServicePaths, config: Path | None, client_fd: int | None = None) -> bool:
    """Returns once a service is ready: True for the new one, False if another one was running.

    Raises ServiceDied, ClientLeft, and RhapsodyError with the service's own words where it cannot start.
    """
    paths.make_folders()
    options = ["--config", str(config.absolute())] if config else []
    if paths.folder:
        options += ["--folder", str(paths.folder.absolute())]
    with _open_log(paths.log) as log:
        log_start = log.tell()
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "rhapsody_mcp", "service", "run", "--detached", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=_home(),
            env={name: value for name, value in os.environ.items() if name not in _OF_STARTER},
            start_new_session=True,
        ) as process:
            assert process.stdout
            report = _read_report(process.stdout.fileno(), client_fd)
    if not report:
        raise ServiceDied(f"the service ended as it started. {_last_log_line(paths.log, log_start)}")
    if "error" in report:
        raise RhapsodyError(report["error"])
    return not report.get("taken")


def _read_report(pipe: int, client_fd: int | None) -> dict[str, Any]:
    """Empty if the service ended before it reported."""
    line, deadline = b"", time.monotonic() + STARTUP_TIMEOUT_S
    while not line.endswith(b"\n"):
        if not is_readable(pipe, client_fd, deadline):
            raise ServiceUnavailable(f"the service is not ready after {STARTUP_TIMEOUT_S:.0f} s; it goes on starting.")
        if not (data := os.read(pipe, 65536)):
            return {}
        line += data
    report: dict[str, Any] = json.loads(line)
    return report


@contextmanager
def _open_log(log: Path) -> Iterator[Any]:
    """The log, open for appending. A long log is renamed first."""
    try:
        if log.exists() and log.stat().st_size > _MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InvalidSettings(
            f"the service cannot keep its state in {log.parent}: {error.strerror}. Name another --folder, or serve "
            "without a service and its ledger: --in-process."
        ) from error
    with os.fdopen(descriptor, "ab") as file:
        yield file


def _last_log_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _LOG_END_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return f"Its last words: {lines[-1]} (more in {log})" if lines else f"Its log {log} says nothing of it."


def _home() -> Path:
    home = Path(os.path.expanduser("~"))
    return home if home.is_dir() else Path("/")
