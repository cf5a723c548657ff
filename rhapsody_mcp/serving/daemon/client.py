"""Finds the service of this user, starts it where there is none, and says who calls."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rhapsody_mcp
from rhapsody_mcp.model.errors import RhapsodyError
from rhapsody_mcp.serving.daemon.connection import PATIENCE_S, Line, ServiceHangs, ServiceUnavailable
from rhapsody_mcp.serving.daemon.spawn import StartCutOff, start_service
from rhapsody_mcp.serving.paths import Places
from rhapsody_mcp.serving.peer_credentials import credentials

__all__ = ["Caller"]

_AGAIN_S = 0.05
_STARTS = 3
_ORDERED_S, _CLIENT_S = 5.0, 10.0
"""How long a service that works may take for its first answer, to a person's order and to a client."""


@dataclass(frozen=True)
class Caller:
    """Who calls the service. `config` are the settings for one that must be started; `client` is as in Line."""

    places: Places
    config: Path | None = None
    client: int | None = None

    def join(self, **wanted: Any) -> tuple[Line, dict[str, Any]]:
        """A line to a service of this version, started where none runs, and its answer to `wanted`.

        Raises ServiceHangs, ServiceUnavailable, and RhapsodyError in the words of a service that refuses.
        """
        until, starts = time.monotonic() + PATIENCE_S, _STARTS
        while time.monotonic() < until:
            line = self._reach()
            if line is None:
                try:
                    if not start_service(self.places, self.config, self.client):
                        time.sleep(_AGAIN_S)  # the other has not opened its socket yet, or has closed it already
                except StartCutOff:
                    if not (starts := starts - 1):
                        raise
                continue
            answer = self._greet(line, wanted)
            if answer is None or "ending" in answer:
                line.wait_for_end(until - time.monotonic())
            elif answer["rhapsody"] != rhapsody_mcp.__version__:
                line.socket.close()
                self._end_earlier(answer["rhapsody"])
            else:
                _check(answer)
                return line, answer
        raise ServiceUnavailable(f"the service is not there after {PATIENCE_S:.0f} s. Its log is {self.places.log}.")

    def order(self) -> Line | None:
        """A line for orders to the service that runs, of whatever version; None where none does. Raises ServiceHangs,
        and as `join`."""
        line = self._reach()
        if line is None or (answer := self._greet(line, {"as": "control"})) is None:
            return None
        _check(answer)
        if "ending" in answer:
            line.wait_for_end()
            return self.order()
        return line

    def _reach(self) -> Line | None:
        """Raises InvalidSettings where what is at the socket's place could be another user's."""
        self.places.check()
        opened = socket.socket(socket.AF_UNIX)
        try:
            opened.connect(str(self.places.socket))
        except OSError as error:
            opened.close()
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                return None
            raise ServiceUnavailable(f"{self.places.socket} cannot be reached: {error.strerror}.") from error
        return Line(opened, self.client)

    def _greet(self, line: Line, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """The answer to a hello, which a service that works gives at once; one that starts or ends is waited for."""
        patience_s = _ORDERED_S if self.client is None else _CLIENT_S
        until = time.monotonic() + PATIENCE_S
        line.tell(self._hello(wanted))
        while True:
            served = self.places.serves
            try:
                return line.hear(patience_s)
            except ServiceUnavailable as error:
                if served and self.places.serves:
                    raise self._hanging(line, patience_s) from error
                if time.monotonic() > until:
                    raise

    def _hanging(self, line: Line, patience_s: float) -> ServiceHangs:
        pid = credentials(line.socket)[0] or None
        process = f" (process {pid})" if pid else ""
        return ServiceHangs(
            line,
            pid,
            f"a service runs{process}, but it has not answered within {patience_s:.0f} s: it hangs, or somebody has "
            f"stopped it (kill -STOP). Its log is {self.places.log}. Try again later. If it stays so, end it: "
            f"rhapsody-mcp service stop --force{self.places.option}; what runs is lost then, and all else is kept.",
        )

    def _hello(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        config = str(self.config.absolute()) if self.config else None
        return {"rhapsody": rhapsody_mcp.__version__, "config": config, "cwd": _here(), **wanted}

    def _end_earlier(self, version: str) -> None:
        """End a service of an earlier version that nobody uses, so that one of this version is started.

        Raises ServiceUnavailable where it is used, or later than this one.
        """
        here = rhapsody_mcp.__version__
        reason = "Use that version here too."
        if _ordered(version) <= _ordered(here):
            if (line := self.order()) is None:
                return
            told = line.ask({"do": "stop", "if_idle": True}) or {}
            if "refused" not in told:
                line.wait_for_end()
                return
            reason = told["refused"]
        raise ServiceUnavailable(
            f"the service that runs here is version {version}, and this is version {here}. {reason} To change "
            f"to version {here}: rhapsody-mcp service stop{self.places.option}, then connect again."
        )


def _check(answer: Mapping[str, Any]) -> None:
    if "error" in answer:
        raise RhapsodyError(answer["error"])


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""


def _ordered(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]
