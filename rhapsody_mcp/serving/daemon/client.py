"""Connects to the user's service, and starts one where none runs."""

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
from rhapsody_mcp.serving.daemon.connection import (
    STARTUP_TIMEOUT_S,
    ServiceConnection,
    ServiceHangs,
    ServiceUnavailable,
)
from rhapsody_mcp.serving.daemon.spawn import ServiceDied, start_service
from rhapsody_mcp.serving.paths import ServicePaths
from rhapsody_mcp.serving.peer_credentials import peer_pid_and_uid

__all__ = ["ServiceClient"]

_RETRY_S = 0.05
_MAX_STARTS = 3
_COMMAND_TIMEOUT_S, _CLIENT_TIMEOUT_S = 5.0, 10.0
"""How long a running service may take for its first reply, to a command of a person and to an MCP client."""


@dataclass(frozen=True)
class ServiceClient:
    """Makes connections to the service at `paths`. `config` is the settings file of a service that must be started;
    `client_fd` is as in ServiceConnection."""

    paths: ServicePaths
    config: Path | None = None
    client_fd: int | None = None

    def connect(self, **hello: Any) -> tuple[ServiceConnection, dict[str, Any]]:
        """A connection to a service of this version, started where none runs, and its reply to `hello`.

        Raises ServiceHangs, ServiceUnavailable, and RhapsodyError with the service's own words where it refuses.
        """
        deadline, starts_left = time.monotonic() + STARTUP_TIMEOUT_S, _MAX_STARTS
        while time.monotonic() < deadline:
            connection = self._connect()
            if connection is None:
                try:
                    if not start_service(self.paths, self.config, self.client_fd):
                        time.sleep(_RETRY_S)  # another service has the lock, but its socket is not open
                except ServiceDied:
                    if not (starts_left := starts_left - 1):
                        raise
                continue
            reply = self._handshake(connection, hello)
            if reply is None or "ending" in reply:
                connection.wait_for_close(deadline - time.monotonic())
            elif reply["rhapsody"] != rhapsody_mcp.__version__:
                connection.socket.close()
                self._stop_older(reply["rhapsody"])
            else:
                _raise_error(reply)
                return connection, reply
        raise ServiceUnavailable(
            f"the service is not there after {STARTUP_TIMEOUT_S:.0f} s. Its log is {self.paths.log}."
        )

    def connect_control(self) -> ServiceConnection | None:
        """A control connection to the running service of any version; None where none runs. Raises as `connect`."""
        connection = self._connect()
        if connection is None or (reply := self._handshake(connection, {"as": "control"})) is None:
            return None
        _raise_error(reply)
        if "ending" in reply:
            connection.wait_for_close()
            return self.connect_control()
        return connection

    def _connect(self) -> ServiceConnection | None:
        """None where no service listens. Raises InvalidSettings where the socket could be another user's."""
        self.paths.check()
        unconnected = socket.socket(socket.AF_UNIX)
        try:
            unconnected.connect(str(self.paths.socket))
        except OSError as error:
            unconnected.close()
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                return None
            raise ServiceUnavailable(f"{self.paths.socket} cannot be reached: {error.strerror}.") from error
        return ServiceConnection(unconnected, self.client_fd)

    def _handshake(self, connection: ServiceConnection, hello: Mapping[str, Any]) -> dict[str, Any] | None:
        """The reply to a hello. A running service replies at once; one that starts or ends is waited for."""
        timeout_s = _COMMAND_TIMEOUT_S if self.client_fd is None else _CLIENT_TIMEOUT_S
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        connection.send({**self._common_fields(), **hello})
        while True:
            answered_at_once = self.paths.answers_at_once
            try:
                return connection.receive(timeout_s)
            except ServiceUnavailable as error:
                if answered_at_once and self.paths.answers_at_once:
                    raise self._hanging(connection, timeout_s) from error
                if time.monotonic() > deadline:
                    raise

    def _hanging(self, connection: ServiceConnection, timeout_s: float) -> ServiceHangs:
        pid = peer_pid_and_uid(connection.socket)[0] or None
        process = f" (process {pid})" if pid else ""
        return ServiceHangs(
            connection,
            pid,
            f"a service runs{process}, but it has not answered within {timeout_s:.0f} s: it hangs, or somebody has "
            f"stopped it (kill -STOP). Its log is {self.paths.log}. Try again later. If it stays so, end it: "
            f"rhapsody-mcp service stop --force{self.paths.command_option}; what runs on this machine is lost then, "
            "and all else is kept.",
        )

    def _common_fields(self) -> dict[str, Any]:
        config = str(self.config.absolute()) if self.config else None
        return {"rhapsody": rhapsody_mcp.__version__, "config": config, "cwd": _current_folder()}

    def _stop_older(self, version: str) -> None:
        """Stop an unused service of an older version, so that one of this version can start.

        Raises ServiceUnavailable where the service is in use, or newer than this version.
        """
        own_version = rhapsody_mcp.__version__
        reason = "Use that version here too."
        if _version_numbers(version) <= _version_numbers(own_version):
            if (connection := self.connect_control()) is None:
                return
            reply = connection.request({"do": "stop", "if_idle": True}) or {}
            if "refused" not in reply:
                connection.wait_for_close()
                return
            reason = reply["refused"]
        raise ServiceUnavailable(
            f"the service that runs here is version {version}, and this is version {own_version}. {reason} To change "
            f"to version {own_version}: rhapsody-mcp service stop{self.paths.command_option}, then connect again."
        )


def _raise_error(reply: Mapping[str, Any]) -> None:
    if "error" in reply:
        raise RhapsodyError(reply["error"])


def _current_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # the folder was removed
        return ""


def _version_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]
