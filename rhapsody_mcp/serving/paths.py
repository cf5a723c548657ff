"""Paths of a user's service on this machine: socket, lock, state folder and logs."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from rhapsody_mcp.model.errors import InvalidSettings

__all__ = ["ServicePaths"]

_MAX_SOCKET_PATH_BYTES = 100
"""The kernel's limit is 107 bytes; the socket is first bound under a longer name and then renamed."""


@dataclass(frozen=True)
class ServicePaths:
    """Paths of one service. Without `folder` this is the user's default service, whose paths depend on the uid and the
    host name alone, not on environment variables. With `folder` it is a separate service with all its files there, on
    one host at a time: on another host the next service goes on with what the folder has."""

    folder: Path | None = None

    @property
    def host(self) -> str:
        return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64]

    @property
    def socket_folder(self) -> Path:
        """On a local disk, and private to the user."""
        return self.folder or Path(f"/tmp/rhapsody-mcp-{os.geteuid()}")

    @property
    def socket(self) -> Path:
        return self.socket_folder / f"{self.host}.sock"

    @property
    def lock(self) -> Path:
        """The service holds this lock from start to end."""
        return self.socket_folder / f"{self.host}.lock"

    @property
    def answers_at_once(self) -> bool:
        """False while the service says in its lock file that it starts or ends."""
        try:
            return bool(json.loads(self.lock.read_bytes())["state"] == "serves")
        except (OSError, ValueError, KeyError, TypeError):
            return True

    @property
    def state(self) -> Path:
        """The folder of the ledger and the logs. Of the user's default services each host has its own, because hosts
        may share the home folder."""
        return self.folder / "state" if self.folder else _user_state() / self.host

    @property
    def log(self) -> Path:
        return self.state / "service.log"

    @property
    def audit(self) -> Path:
        return self.state / "audit.jsonl"

    @property
    def tokens(self) -> Path:
        """The file with the hashes of the bearer tokens for HTTP."""
        return self.state / "tokens.json"

    @property
    def command_option(self) -> str:
        """The option with which a command line selects this service."""
        return f" --folder {shlex.quote(str(self.folder))}" if self.folder else ""

    def make_folders(self) -> None:
        """Make missing folders. Raises InvalidSettings where that fails, and as `check` does."""
        for folder in (self.socket_folder, self.state):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidSettings(f"the folder {folder} cannot be made: {error.strerror}. {_ADVICE}") from error
        self.check()

    def check(self) -> None:
        """Raises InvalidSettings where an existing file or folder belongs to another user, where another user could
        replace the socket, and where the socket's path is too long."""
        if len(os.fsencode(self.socket)) > _MAX_SOCKET_PATH_BYTES:
            raise InvalidSettings(
                f"the path of the socket {self.socket} is longer than the {_MAX_SOCKET_PATH_BYTES} bytes that it may "
                "have. Name a shorter --folder."
            )
        for path in (self.socket_folder, self.socket, self.state):
            _check_owner(path)
        if self.socket_folder.exists() and stat.S_IMODE(self.socket_folder.stat().st_mode) & 0o022:
            raise InvalidSettings(
                f"others can write in the folder {self.socket_folder}, and put a socket of theirs in the place of "
                f"ours: chmod 700 {self.socket_folder}, or name another --folder."
            )


_ADVICE = "Name another --folder."


def _check_owner(path: Path) -> None:
    try:
        owner = path.lstat().st_uid
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidSettings(f"{path} cannot be looked at: {error.strerror}. {_ADVICE}") from error
    if owner != os.geteuid():
        raise InvalidSettings(
            f"{path} belongs to another user (uid {owner}), who could read what is sent to it. "
            f"Have it removed, or name another --folder."
        )


def _user_state() -> Path:
    import platformdirs

    return platformdirs.user_state_path("rhapsody-mcp")
