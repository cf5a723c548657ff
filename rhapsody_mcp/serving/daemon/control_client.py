"""The commands that control the service: start, stop, status, and HTTP for as long as the command runs."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rhapsody_mcp.model.errors import NotConfirmed, RhapsodyError
from rhapsody_mcp.serving.daemon.client import ServiceClient
from rhapsody_mcp.serving.daemon.connection import ServiceConnection, ServiceHangs, ServiceUnavailable

__all__ = ["listen", "logs", "start", "status", "stop", "write"]

_STOP_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 10.0
_NOT_RUNNING = "No service runs here"
_ENDED = "The service has ended; its sessions are kept."


def start(client: ServiceClient, say: Callable[[str], None]) -> int:
    """Raises RhapsodyError where the service already runs with settings other than those of `client.config`."""
    connection, reply = client.connect(**{"as": "control"})
    if client.config and reply["notes"]:
        raise RhapsodyError(" ".join(reply["notes"]))
    _warn(reply["notes"])
    say(_headline(_checked(connection.request({"do": "status"}))))
    return 0


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        sys.stderr.write(f"rhapsody-mcp: {note}\n")


def stop(client: ServiceClient, force: bool, say: Callable[[str], None]) -> int:
    """Returns when the service has ended. Without `force`, raises NotConfirmed while tasks have not ended, and
    ServiceHangs where the service does not answer."""
    try:
        connection = client.connect_control()
    except ServiceHangs as hanging:
        if not force or hanging.pid is None:
            raise
        return _kill(hanging.connection, hanging.pid, say)
    if connection is None:
        say(f"{_NOT_RUNNING}.")
        return 0
    reply = connection.request({"do": "stop", "force": force})
    if reply is not None and "refused" in reply:
        raise NotConfirmed(
            f"{reply['refused']} Wait for them, or stop it now with --force: those that run on this machine "
            "are lost then, those in a job of the scheduler go on, and those that wait go on when it starts again."
        )
    if not connection.wait_for_close(_STOP_TIMEOUT_S):
        raise ServiceUnavailable(f"it has not ended after {_STOP_TIMEOUT_S:.0f} s; it goes on with that.")
    say(_ENDED)
    return 0


def _kill(connection: ServiceConnection, pid: int, say: Callable[[str], None]) -> int:
    say(f"The service (process {pid}) does not answer. It is ended with SIGKILL; the keepers end its engines.")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if not connection.wait_for_close(_CLOSE_TIMEOUT_S):
        raise ServiceUnavailable(f"process {pid} has not ended {_CLOSE_TIMEOUT_S:.0f} s after SIGKILL.")
    say(_ENDED)
    return 0


def status(client: ServiceClient, as_json: bool, say: Callable[[str], None]) -> int:
    """The exit code: 0 where a service runs, else 1. Raises ServiceHangs, but with `as_json` prints that instead."""
    try:
        connection = client.connect_control()
    except ServiceHangs as hanging:
        if not as_json:
            raise
        say(json.dumps({"running": True, "answers": False, "pid": hanging.pid, "log": str(client.paths.log)}))
        return 1
    service = connection and connection.request({"do": "status"})
    if as_json:
        say(json.dumps({"running": bool(service), **(service or {})}))
    elif service:
        say("\n".join([_headline(service), *_details(service)]))
    else:
        say(f"{_NOT_RUNNING}: nothing answers on {client.paths.socket}. The first client starts one.")
    return 0 if service else 1


def logs(
    client: ServiceClient, session: str, task: str, rank: int | None, follow: bool, write: Callable[[str, str], None]
) -> int:
    """Write what the task prints, each piece with its stream; with `follow`, until the task has ended. The exit code: 1
    where the task has ended otherwise than DONE, else 0. Raises RhapsodyError for an unknown session or task."""
    connection = client.connect_control()
    if connection is None:
        raise ServiceUnavailable(f"no service runs here: nothing answers on {client.paths.socket}.")
    connection.send({"do": "logs", "session": session, "task": task, "rank": rank, "follow": follow})
    while "ended" not in (message := _checked(connection.receive(math.inf))):
        write(message["stream"], message["text"])
    return int(message["ended"] not in ("", "DONE"))


def write(client: ServiceClient, session: str, files: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Have the service write files of a session, whose paths stand by their kinds. Raises RhapsodyError."""
    connection, reply = client.connect(**{"as": "control"})
    _warn(reply["notes"])
    _checked(connection.request({"do": "write", "session": session, "files": files}))
    say(f"Wrote {', '.join(files.values())}.")
    return 0


def _checked(reply: dict[str, Any] | None) -> dict[str, Any]:
    if reply is None:
        raise ServiceUnavailable("the service went away.")
    if "error" in reply:
        raise RhapsodyError(reply["error"])
    return reply


def _headline(service: Mapping[str, Any]) -> str:
    uptime = _duration(service["uptime_s"])
    return f"The service runs: version {service['version']}, process {service['pid']}, for {uptime}."


def _details(service: Mapping[str, Any]) -> Iterator[str]:
    yield f"Socket: {service['socket']}"
    yield f"State:  {service['state']}"
    yield f"Ledger: {service['ledger_problem'] or 'written'}"
    yield f"Clients: {service['connections']}" + "".join(f", and {address}" for address in service["listeners"])
    yield f"Settings: {_settings(service)}"
    yield f"Sessions: {len(service['sessions'])}"
    for row in service["sessions"]:
        yield f"  {row['session']}: {row['running']} running, {row['queued']} queued, {row['waiting']} waiting"


def _settings(service: Mapping[str, Any]) -> str:
    file = service["settings_file"]
    if changed := service["settings_changed"]:
        return f"{file}, which has changed since it started: {changed}"
    return file if os.path.exists(file) else f"there is no {file}; every default holds"


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if hours < 1 else f"{hours} h {minutes % 60} min"


def listen(client: ServiceClient, options: Mapping[str, Any], begin: Callable[[str, str], None]) -> int:
    """Have the service listen on HTTP until this process gets SIGINT or SIGTERM, or ends. Returns when the listener is
    closed. `begin` gets what the service says, and its address. Raises RhapsodyError with the service's own words."""
    connection, reply = client.connect(**{"as": "control"})
    _warn(reply["notes"])
    with _signals_raise():
        try:
            listening = _checked(connection.request({"do": "listen", **options}))
            begin(listening["said"], listening["address"])
            connection.wait_for_close(math.inf)
        except _Interrupted:
            return _close_listener(connection)
    raise ServiceUnavailable(f"the service went away. Its log is {client.paths.log}.")


class _Interrupted(BaseException):
    """A signal asked this process to end."""


@contextmanager
def _signals_raise() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise _Interrupted

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _close_listener(connection: ServiceConnection) -> int:
    with suppress(OSError):
        connection.socket.shutdown(socket.SHUT_WR)
    connection.wait_for_close(_CLOSE_TIMEOUT_S)
    return 0
