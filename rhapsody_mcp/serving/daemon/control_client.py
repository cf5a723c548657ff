"""The commands that speak to the service: start, stop and status, and HTTP for as long as a command lives."""

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
from rhapsody_mcp.serving.daemon.client import Caller
from rhapsody_mcp.serving.daemon.connection import Line, ServiceHangs, ServiceUnavailable

__all__ = ["listen", "start", "status", "stop"]

_ENDS_WITHIN_S = 120.0
_CLOSES_WITHIN_S = 10.0
_NONE = "No service runs here"
_ENDED = "The service has ended; its sessions are kept."


def start(caller: Caller, say: Callable[[str], None]) -> int:
    """Raises RhapsodyError where it runs already with other settings than those that were named."""
    line, answer = caller.join(**{"as": "control"})
    if caller.config and answer["notes"]:
        raise RhapsodyError(" ".join(answer["notes"]))
    _warn(answer["notes"])
    say(_headline(_told(line.ask({"do": "status"}))))
    return 0


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        sys.stderr.write(f"rhapsody-mcp: {note}\n")


def stop(caller: Caller, force: bool, say: Callable[[str], None]) -> int:
    """Returns when it has ended. Raises NotConfirmed where tasks have not ended and it is not forced, and ServiceHangs
    where it does not answer and is not forced."""
    try:
        line = caller.order()
    except ServiceHangs as hanging:
        if not force or hanging.pid is None:
            raise
        return _kill(hanging.line, hanging.pid, say)
    if line is None:
        say(f"{_NONE}.")
        return 0
    answer = line.ask({"do": "stop", "force": force})
    if answer is not None and "refused" in answer:
        raise NotConfirmed(
            f"{answer['refused']} Wait for them, or stop it now with --force: those that run are lost then, and "
            "those that wait go on when it starts again."
        )
    if not line.wait_for_end(_ENDS_WITHIN_S):
        raise ServiceUnavailable(f"it has not ended after {_ENDS_WITHIN_S:.0f} s; it goes on with that.")
    say(_ENDED)
    return 0


def _kill(line: Line, pid: int, say: Callable[[str], None]) -> int:
    say(f"The service (process {pid}) does not answer. It is ended with SIGKILL; the keepers end its engines.")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if not line.wait_for_end(_CLOSES_WITHIN_S):
        raise ServiceUnavailable(f"process {pid} has not ended {_CLOSES_WITHIN_S:.0f} s after SIGKILL.")
    say(_ENDED)
    return 0


def status(caller: Caller, as_json: bool, say: Callable[[str], None]) -> int:
    """0 where a service runs, else 1. Raises ServiceHangs where it does not answer, but for JSON, which says so."""
    try:
        line = caller.order()
    except ServiceHangs as hanging:
        if not as_json:
            raise
        say(json.dumps({"running": True, "answers": False, "pid": hanging.pid, "log": str(caller.places.log)}))
        return 1
    told = line and line.ask({"do": "status"})
    if as_json:
        say(json.dumps({"running": bool(told), **(told or {})}))
    elif told:
        say("\n".join([_headline(told), *_details(told)]))
    else:
        say(f"{_NONE}: nothing answers on {caller.places.socket}. The first client starts one.")
    return 0 if told else 1


def _told(answer: dict[str, Any] | None) -> dict[str, Any]:
    if answer is None:
        raise ServiceUnavailable("the service went away.")
    if "error" in answer:
        raise RhapsodyError(answer["error"])
    return answer


def _headline(told: Mapping[str, Any]) -> str:
    return f"The service runs: version {told['version']}, process {told['pid']}, for {_span(told['uptime_s'])}."


def _details(told: Mapping[str, Any]) -> Iterator[str]:
    yield f"Socket: {told['socket']}"
    yield f"State:  {told['state']}"
    yield f"Ledger: {told['ledger_problem'] or 'written'}"
    yield f"Clients: {told['connections']}" + "".join(f", and {address}" for address in told["listeners"])
    yield f"Settings: {_settings(told)}"
    yield f"Sessions: {len(told['sessions'])}"
    for row in told["sessions"]:
        yield f"  {row['session']}: {row['running']} running, {row['queued']} queued, {row['waiting']} waiting"


def _settings(told: Mapping[str, Any]) -> str:
    file = told["settings_file"]
    if changed := told["settings_changed"]:
        return f"{file}, which has changed since it started: {changed}"
    return file if os.path.exists(file) else f"there is no {file}; every default holds"


def _span(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if hours < 1 else f"{hours} h {minutes % 60} min"


def listen(caller: Caller, order: Mapping[str, Any], say: Callable[[str], None]) -> int:
    """Have the service listen on HTTP until SIGINT or SIGTERM, or the end of this process. Returns when its listener
    is closed. Raises RhapsodyError in the service's words."""
    line, answer = caller.join(**{"as": "control"})
    _warn(answer["notes"])
    with _signals():
        try:
            say(_told(line.ask({"do": "listen", **order}))["said"])
            line.wait_for_end(math.inf)
        except _Asked:
            return _leave(line)
    raise ServiceUnavailable(f"the service went away. Its log is {caller.places.log}.")


class _Asked(BaseException):
    """To end, by a signal."""


@contextmanager
def _signals() -> Iterator[None]:
    def ask(*_: object) -> None:
        raise _Asked

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(line: Line) -> int:
    with suppress(OSError):
        line.socket.shutdown(socket.SHUT_WR)
    line.wait_for_end(_CLOSES_WITHIN_S)
    return 0
