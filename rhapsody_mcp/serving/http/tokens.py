"""The bearer tokens of an HTTP server: a file that holds their hashes, and what each may do."""

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

__all__ = ["SCOPES", "Token", "TokenFile", "Tokens", "plain_token"]

SCOPES = ("read", "run")
"""`read`: the tools that change nothing, resources and prompts. `run`: everything."""
_DAY_S = 86400.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_PLAIN = re.compile(r"[A-Za-z0-9._~+/-]{16,4096}=*")
_log = logging.getLogger(__name__)


class Token(msgspec.Struct, frozen=True):
    """What is kept of a token: not itself. `created` and `expires` are seconds since 1970."""

    name: str
    hash: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None = None

    def is_over(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


class TokenFile:
    """The tokens of a service, in a file of mode 0600 that holds their hashes. Each method reads it again.

    Every method raises InvalidSettings where the file cannot be used, or somebody else can read or write it.
    """

    def __init__(self, file: Path, now: Callable[[], float] = time.time) -> None:
        self.file, self.now = file, now

    def read(self) -> list[Token]:
        """Every token, expired ones too; none where there is no file."""
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
        """A line for each token, for people."""
        rows = [(one.name, ",".join(one.scopes), _day(one.created), _until(one, self.now())) for one in self.read()]
        head = ("NAME", "SCOPES", "CREATED", "VALID UNTIL")
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
        return "\n".join(lines if rows else ["There is no token. Make one: rhapsody-mcp token create NAME"])

    def create(self, name: str, scopes: Sequence[str] = SCOPES, days: float | None = None) -> str:
        """A new token, which nothing but this reply holds. Raises InvalidSettings where the name or a scope is wrong,
        or another token has the name."""
        _check(name, scopes)
        token = f"rh_{secrets.token_urlsafe(32)}"
        now = self.now()
        with self._changed() as tokens:
            if any(one.name == name for one in tokens):
                raise InvalidSettings(
                    f"there is a token {name!r}. Choose another name, or first `rhapsody-mcp token revoke {name}`."
                )
            expires = None if days is None else now + days * _DAY_S
            tokens.append(Token(name, hash_of(token), tuple(scopes), now, expires))
        return token

    def create_first(self) -> str | None:
        """A token for everything where none is valid, so that a first start needs no other command; else None."""
        if any(not token.is_over(self.now()) for token in self.read()):
            return None
        taken = {token.name for token in self.read()}
        names = ("first", *(f"first-{number}" for number in range(2, len(taken) + 3)))
        return self.create(next(name for name in names if name not in taken))

    def revoke(self, name: str) -> None:
        """Servers that run take it no longer. Raises UnknownName."""
        with self._changed() as tokens:
            left = [token for token in tokens if token.name != name]
            if len(left) == len(tokens):
                raise UnknownName("token", name, [token.name for token in tokens])
            tokens[:] = left

    @contextmanager
    def _changed(self) -> Iterator[list[Token]]:
        """The tokens, to be changed in place; written at the end of the block, and not where it raises."""
        try:
            _make(self.file.parent)
            with open(self.file.with_suffix(".lock"), "a", opener=_for_us_alone) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                tokens = self.read()
                yield tokens
                self._write(tokens)
        except OSError as error:
            raise InvalidSettings(f"the token file {self.file} cannot be written: {error.strerror}.") from error

    def _write(self, tokens: list[Token]) -> None:
        """It is never there half written, and never open to others."""
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


class Tokens:
    """A token verifier, as the SDK calls it: it knows the tokens of a file as it is now, and a plain one of the user's.

    A file that cannot be used any more lets in nobody who needs it.
    """

    def __init__(self, file: TokenFile, plain: str | None = None) -> None:
        self._file = file
        self._plain = [] if plain is None else [Token("token-file", hash_of(plain), SCOPES, 0.0)]
        self._seen: tuple[int, ...] = ()
        self._read: list[Token] = []

    async def verify_token(self, token: str) -> AccessToken | None:
        """Whoever takes the AccessToken gets the hash in the place of the token."""
        found = self.find(hash_of(token))
        if found is None:
            return None
        expires = None if found.expires is None else int(found.expires)
        return AccessToken(token=found.hash, client_id=found.name, scopes=list(found.scopes), expires_at=expires)

    def find(self, hash: str) -> Token | None:
        """The valid token with this hash. Every one is compared, each in constant time, whichever it is."""
        now = self._file.now()
        equal = [token for token in (*self._plain, *self._tokens()) if hmac.compare_digest(token.hash, hash)]
        return next((token for token in equal if not token.is_over(now)), None)

    def _tokens(self) -> list[Token]:
        """Read again where the file has changed."""
        seen = _version(self._file.file)
        if seen != self._seen:
            self._seen, self._read = seen, []
            try:
                self._read = self._file.read()
            except InvalidSettings as error:
                _log.warning("no token is taken: %s", error)
        return self._read


def _make(folder: Path) -> None:
    """With the folders above it that are not there; each is ours alone."""
    for missing in reversed([one for one in (folder, *folder.parents) if not one.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)


def _for_us_alone(file: str, flags: int) -> int:
    return os.open(file, flags, 0o600)


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _until(token: Token, now: float) -> str:
    if token.expires is None:
        return "no end"
    return _day(token.expires) + (" (expired)" if token.is_over(now) else "")


def _version(file: Path) -> tuple[int, ...]:
    """Another one where the file is another or was changed; empty where there is none."""
    try:
        info = file.stat()
    except OSError:
        return ()
    return info.st_mtime_ns, info.st_ino, info.st_size, info.st_mode, info.st_uid


def hash_of(token: str) -> str:
    """SHA-256 alone: a token is 256 random bits, so there is no list of likely ones for salt and slowness to defeat."""
    return hashlib.sha256(token.encode()).hexdigest()


def plain_token(file: Path) -> str:
    """The token in a file that the user wrote. Raises InvalidSettings where it cannot be used, or somebody else can
    read or write it."""
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
    if not _PLAIN.fullmatch(token):
        raise InvalidSettings(
            f"the token file {file} holds no token. Valid: one line of at least 16 letters, digits or ._~+/-, "
            "random ones: nothing slows down whoever guesses."
        )
    return token


def _check(name: str, scopes: Sequence[str]) -> None:
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
