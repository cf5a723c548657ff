"""Opens the socket that an HTTP server listens on."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rhapsody_mcp.model.errors import InvalidSettings

__all__ = ["Listener", "listen_on_host", "listen_on_socket"]

_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Listener:
    """`private` where the operating system lets in this machine or this user alone; `names` are what clients may
    call the host; a wildcard address has none."""

    socket: socket.socket
    address: str
    names: tuple[str, ...]
    private: bool


@contextmanager
def listen_on_host(host: str, port: int) -> Iterator[Listener]:
    """Listens until the end of the block; port 0 takes a free one. Raises InvalidSettings where it cannot."""
    family, address = _resolve(host, port)
    try:
        opened = socket.create_server(address, family=family)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        advice = (
            "Another program listens there: choose another --port." if taken else "Choose another --host or --port."
        )
        raise InvalidSettings(f"{host} port {port} cannot be listened on: {error.strerror}. {advice}") from error
    with opened:
        # Connections inherit it. asyncio sets it on sockets of protocol TCP alone, which create_server's do not name; a
        # reply in two pieces would wait 40 ms for the client's acknowledgement of the first.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        number = ipaddress.ip_address(str(address[0]).partition("%")[0])
        local = number.is_loopback
        names = () if number.is_unspecified else (host, str(number), *(_HERE if local else ()))
        shown = f"[{host}]" if ":" in host else host
        yield Listener(opened, f"http://{shown}:{opened.getsockname()[1]}/mcp", names, local)


def _resolve(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidSettings(
            f"the host {host!r} cannot be listened on: {reason}. Give a name or an address of this machine, "
            "such as 127.0.0.1."
        ) from error
    return family, address


@contextmanager
def listen_on_socket(path: Path) -> Iterator[Listener]:
    """A Unix socket of mode 0600, removed at the end of the block. One that a killed server left is replaced.

    Raises InvalidSettings where another server listens, or where somebody else could put a socket in its place.
    """
    try:
        _check_folder(path.parent)
        _clear(path)
        opened = _bind(path)
    except OSError as error:
        reason = error.strerror or str(error)  # of a path that is too long, the text alone
        raise InvalidSettings(f"the socket {path} cannot be made: {reason}. Choose another --socket.") from error
    made = path.stat()
    try:
        with opened:
            yield Listener(opened, f"http://localhost/mcp on the socket {path}", _HERE, True)
    finally:
        with suppress(OSError):
            if os.path.samestat(path.stat(), made):
                path.unlink()


def _check_folder(folder: Path) -> None:
    info = folder.stat()
    mine = info.st_uid in (0, os.geteuid())
    shared = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not info.st_mode & stat.S_ISVTX
    if not mine or shared:
        raise InvalidSettings(
            f"others can replace a socket in {folder}. Choose a --socket in a folder that only you can write."
        )


def _clear(path: Path) -> None:
    """Removes what no server listens on any more; a file that is no socket stays, and binding to it fails."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as caller:
        try:
            caller.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise InvalidSettings(f"a server listens on the socket {path} already. Choose another --socket.")


def _bind(path: Path) -> socket.socket:
    opened = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        opened.bind(str(path))
        opened.listen()
    except OSError:
        opened.close()
        raise
    finally:
        os.umask(before)
    return opened
