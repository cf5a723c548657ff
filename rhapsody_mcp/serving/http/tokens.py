"""Bearer tokens for HTTP: a file with their hashes and scopes, and their verification."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import msgspec
from mcp.server.auth.provider import AccessToken

from rhapsody_mcp.model.errors import InvalidSettings, UnknownName

__all__ = ["SCOPES", "Token", "TokenFile", "TokenVerifier", "read_plain_token"]

SCOPES = ("read", "run")
"""`read` covers resources, prompts and the tools that change nothing; `run` covers everything."""
_DAY_S = 86400.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PLAIN_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,4096}=*")
_log = logging.getLogger(__name__)


class Token(msgspec.Struct, frozen=True):
    """A token's entry in the file: its hash, not the token. `created` and `expires` are seconds since the epoch."""

    name: str
    hash: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None = None

    def is_expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


class TokenFile:
    """The tokens of a service, in a file of mode 0600. Each method reads the file again.

    Each method raises InvalidSettings where the file cannot be used, or another user can read or write it.
    """

    def __init__(self, file: Path, now: Callable[[], float] = time.time) -> None:
        self.file, self.now = file, now

    def read(self) -> list[Token]:
        """All tokens, with the expired ones; none where the file does not exist."""
        try:
            with self.file.open("rb") as opened:
                _check_private(self.file, os.fstat(opened.fileno()))
                return msgspec.json.decode(opened.read(), type=list[Token])
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InvalidSettings(f"the token file {self.file} cannot be read: {error.strerror}.") from error
        except msgspec.MsgspecError as error:
            raise InvalidSettings(
                f"the token file {self.file} is damaged: {error}. Remove it, and make new tokens with "
                "`rhapsody-mcp token create NAME`."
            ) from error

    def table(self) -> str:
        """A text table with one token a line."""
        rows = [
            (one.name, ",".join(one.scopes), _date(one.created), _valid_until(one, self.now())) for one in self.read()
        ]
        head = ("NAME", "SCOPES", "CREATED", "VALID UNTIL")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
        return "\n".join(lines if rows else ["There is no token. Make one: rhapsody-mcp token create NAME"])

    def create(self, name: str, scopes: Sequence[str] = SCOPES, days: float | None = None) -> str:
        """Make a token and return it; the file gets only its hash. Raises InvalidSettings where the name is invalid or
        in use, or a scope is invalid."""
        _check_new(name, scopes)
        token = f"rh_{secrets.token_urlsafe(32)}"
        now = self.now()
        with self._edit() as tokens:
            if any(entry.name == name for entry in tokens):
                raise InvalidSettings(
                    f"there is a token {name!r}. Choose another name, or first `rhapsody-mcp token revoke {name}`."
                )
            expires = None if days is None else now + days * _DAY_S
            tokens.append(Token(name, token_hash(token), tuple(scopes), now, expires))
        return token

    def create_first(self) -> str | None:
        """A token with all scopes if no token is valid, so that the first start needs no other command; else None."""
        if any(not token.is_expired(self.now()) for token in self.read()):
            return None
        used_names = {token.name for token in self.read()}
        names = ("first", *(f"first-{number}" for number in range(2, len(used_names) + 3)))
        return self.create(next(name for name in names if name not in used_names))

    def revoke(self, name: str) -> None:
        """Remove a token; running servers refuse it from now on. Raises UnknownName."""
        with self._edit() as tokens:
            others = [token for token in tokens if token.name != name]
            if len(others) == len(tokens):
                raise UnknownName("token", name, [token.name for token in tokens])
            tokens[:] = others

    @contextmanager
    def _edit(self) -> Iterator[list[Token]]:
        """The tokens, to be changed in place. The end of the block writes them, unless the block raises."""
        try:
            _make_private(self.file.parent)
            with open(self.file.with_suffix(".lock"), "a", opener=_open_private) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                tokens = self.read()
                yield tokens
                self._write(tokens)
        except OSError as error:
            raise InvalidSettings(f"the token file {self.file} cannot be written: {error.strerror}.") from error

    def _write(self, tokens: list[Token]) -> None:
        """Replaces the file in one step; it is private from the start."""
        handle, draft = tempfile.mkstemp(dir=self.file.parent)
        try:
            with os.fdopen(handle, "wb") as opened:
                opened.write(msgspec.json.format(msgspec.json.encode(tokens)))
                opened.flush()
                os.fsync(handle)
            os.replace(draft, self.file)
        except OSError:
            os.unlink(draft)
            raise


class TokenVerifier:
    """Verifies tokens, as the SDK's protocol of this name: those of a file, and a plain token of the user.

    Notices changes of the file. While the file cannot be used, its tokens are invalid.
    """

    def __init__(self, file: TokenFile, plain_token: str | None = None) -> None:
        self._file = file
        self._plain = [] if plain_token is None else [Token("token-file", token_hash(plain_token), SCOPES, 0.0)]
        self._file_version: tuple[int, ...] = ()
        self._file_tokens: list[Token] = []

    async def verify_token(self, token: str) -> AccessToken | None:
        """The AccessToken has the hash in place of the token."""
        valid = self.find(token_hash(token))
        if valid is None:
            return None
        expires = None if valid.expires is None else int(valid.expires)
        return AccessToken(token=valid.hash, client_id=valid.name, scopes=list(valid.scopes), expires_at=expires)

    def find(self, hash: str) -> Token | None:
        """The valid token with this hash. Compares all tokens, each in constant time, so that timing says nothing."""
        now = self._file.now()
        equal = [token for token in (*self._plain, *self._current_tokens()) if hmac.compare_digest(token.hash, hash)]
        return next((token for token in equal if not token.is_expired(now)), None)

    def _current_tokens(self) -> list[Token]:
        version = _version(self._file.file)
        if version != self._file_version:
            self._file_version, self._file_tokens = version, []
            try:
                self._file_tokens = self._file.read()
            except InvalidSettings as error:
                _log.warning("no token is taken: %s", error)
        return self._file_tokens


def _make_private(folder: Path) -> None:
    """Make the folder and its missing parents, each private to this user."""
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def _open_private(file: str, flags: int) -> int:
    return os.open(file, flags, 0o600)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _valid_until(token: Token, now: float) -> str:
    if token.expires is None:
        return "no end"
    return _date(token.expires) + (" (expired)" if token.is_expired(now) else "")


def _version(file: Path) -> tuple[int, ...]:
    """Differs after every change of the file; empty where there is no file."""
    try:
        info = file.stat()
    except OSError:
        return ()
    return info.st_mtime_ns, info.st_ino, info.st_size, info.st_mode, info.st_uid


def token_hash(token: str) -> str:
    """SHA-256 without salt: a token has 256 random bits, so a dictionary of likely tokens is impossible."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_plain_token(file: Path) -> str:
    """The token in a file that the user wrote. Raises InvalidSettings where the file cannot be used, or another user
    can read or write it."""
    file = file.expanduser()
    try:
        with file.open(encoding="ascii", errors="replace") as opened:
            _check_private(file, os.fstat(opened.fileno()))
            token = opened.read(8192).strip()
    except OSError as error:
        raise InvalidSettings(
            f"the token file {file} cannot be read: {error.strerror}. Write a token of your own into it, with mode "
            "0600; or leave it out, and make one with `rhapsody-mcp token create NAME`."
        ) from error
    if not _PLAIN_TOKEN.fullmatch(token):
        raise InvalidSettings(
            f"the token file {file} holds no token. Valid: one line of at least 16 letters, digits or ._~+/-, "
            "random ones: nothing slows down whoever guesses."
        )
    return token


def _check_new(name: str, scopes: Sequence[str]) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidSettings(
            f"{name!r} is no name for a token. Valid: at most 64 letters, digits or ._@-, as in laptop."
        )
    for scope in scopes:
        if scope not in SCOPES:
            raise UnknownName("scope", scope, SCOPES)
    if not scopes:
        raise InvalidSettings(f"a token needs a scope. Valid: {', '.join(SCOPES)}.")


def _check_private(file: Path, info: os.stat_result) -> None:
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid != os.geteuid() or mode & 0o077:
        raise InvalidSettings(
            f"the token file {file} is open to others (owner {info.st_uid}, mode {mode:04o}). "
            f"It must be your own, with mode 0600: chmod 600 {file}, and replace what is in it, which they may know."
        )
