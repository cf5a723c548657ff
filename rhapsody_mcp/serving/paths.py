"""Where the service of a user is on this machine: its socket, its state and its log."""

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

__all__ = ["Places"]

_LONGEST_SOCKET = 100
"""Bytes of a path; a Unix socket's has at most 107, and the one that is bound before it is renamed is longer."""


@dataclass(frozen=True)
class Places:
    """Without a `folder`: the one service of this user, found from the user's id and the host alone, whatever the
    environment of whoever looks for it. With one: a service of its own, which has everything in it."""

    folder: Path | None = None

    @property
    def host(self) -> str:
        return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64]

    @property
    def meeting(self) -> Path:
        """The folder of the socket: on a disk of this machine, and nobody else's."""
        return self.folder or Path(f"/tmp/rhapsody-mcp-{os.geteuid()}")

    @property
    def socket(self) -> Path:
        return self.meeting / f"{self.host}.sock"

    @property
    def lock(self) -> Path:
        """Held by the service for as long as it lives."""
        return self.meeting / f"{self.host}.lock"

    @property
    def serves(self) -> bool:
        """Whether the service, if one runs, answers at once: it neither starts nor ends, as far as it has said."""
        try:
            return bool(json.loads(self.lock.read_bytes())["state"] == "serves")
        except (OSError, ValueError, KeyError, TypeError):
            return True

    @property
    def state(self) -> Path:
        """The folder of the ledger; the user's home may be shared between hosts, so each has its own."""
        return (self.folder or _user_state()) / self.host

    @property
    def log(self) -> Path:
        return self.state / "service.log"

    @property
    def audit(self) -> Path:
        return self.state / "audit.jsonl"

    @property
    def tokens(self) -> Path:
        """The hashes of the bearer tokens for HTTP."""
        return self.state / "tokens.json"

    @property
    def option(self) -> str:
        """What a command line needs in order to name this service."""
        return f" --folder {shlex.quote(str(self.folder))}" if self.folder else ""

    def make(self) -> None:
        """Make the folders where they are not there. Raises InvalidSettings where they cannot be made, or where
        somebody else could put a socket in the place of ours."""
        for folder in (self.meeting, self.state):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise InvalidSettings(f"the folder {folder} cannot be made: {error.strerror}. {_ADVICE}") from error
        self.check()

    def check(self) -> None:
        """What is there is ours alone; what is not there is passed over. Raises InvalidSettings."""
        if len(os.fsencode(self.socket)) > _LONGEST_SOCKET:
            raise InvalidSettings(
                f"the path of the socket {self.socket} is longer than the {_LONGEST_SOCKET} bytes that it may have. "
                "Name a shorter --folder."
            )
        for place in (self.meeting, self.socket, self.state):
            _check_owner(place)
        if self.meeting.exists() and stat.S_IMODE(self.meeting.stat().st_mode) & 0o022:
            raise InvalidSettings(
                f"others can write in the folder {self.meeting}, and put a socket of theirs in the place of ours: "
                f"chmod 700 {self.meeting}, or name another --folder."
            )


_ADVICE = "Name another --folder."


def _check_owner(place: Path) -> None:
    try:
        owner = place.lstat().st_uid
    except FileNotFoundError:
        return
    except OSError as error:
        raise InvalidSettings(f"{place} cannot be looked at: {error.strerror}. {_ADVICE}") from error
    if owner != os.geteuid():
        raise InvalidSettings(
            f"{place} belongs to another user (uid {owner}), who could read what is sent to it. "
            f"Have it removed, or name another --folder."
        )


def _user_state() -> Path:
    import platformdirs

    return platformdirs.user_state_path("rhapsody-mcp")
