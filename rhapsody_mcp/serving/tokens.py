"""The bearer token of an HTTP server, in a file that its owner alone can read."""

from __future__ import annotations

import os
import re
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

import platformdirs
from mcp.server.auth.provider import AccessToken

from rhapsody_mcp.model.errors import InvalidSettings

__all__ = ["OneToken", "read_or_make_token", "token_file"]

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,4096}=*")


class OneToken:
    """A token verifier, as the SDK calls it, that knows one token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def verify_token(self, token: str) -> AccessToken | None:
        """The time that this takes tells nothing of the token."""
        if not secrets.compare_digest(token.encode(), self._token):
            return None
        return AccessToken(token=token, client_id="bearer", scopes=[])


def token_file() -> Path:
    """Where the token is when no other file is named; it need not exist."""
    return platformdirs.user_state_path("rhapsody-mcp") / "http-token"


def read_or_make_token(file: Path) -> str:
    """The token in `file`; a new one, in a file of mode 0600, where there is none.

    Raises InvalidSettings where the file cannot be used, or somebody else can read or write it.
    """
    try:
        if not file.exists():
            _make(file)
        return _read(file)
    except OSError as error:
        raise InvalidSettings(
            f"the token file {file} cannot be read or made: {error.strerror}. Name another one with --token-file."
        ) from error


def _make(file: Path) -> None:
    """Of two servers that start at once, one makes it; it is never there half written."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=file.parent)
    try:
        with os.fdopen(handle, "w") as opened:
            opened.write(secrets.token_urlsafe(32) + "\n")
        with suppress(FileExistsError):
            os.link(draft, file)
    finally:
        os.unlink(draft)


def _read(file: Path) -> str:
    with file.open(encoding="ascii", errors="replace") as opened:
        info = os.fstat(opened.fileno())
        mode = stat.S_IMODE(info.st_mode)
        if info.st_uid != os.geteuid() or mode & 0o077:
            raise InvalidSettings(
                f"the token file {file} is open to others (owner {info.st_uid}, mode {mode:04o}). "
                f"It must be your own, with mode 0600: chmod 600 {file}, or remove it and a new one is made."
            )
        token = opened.read(8192).strip()
    if not _TOKEN.fullmatch(token):
        raise InvalidSettings(
            f"the token file {file} holds no token. Valid: one line of at least 16 letters, digits or ._~+/-; "
            "remove the file and a new one is made."
        )
    return token
