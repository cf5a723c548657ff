"""Opens the listening socket of an HTTP server."""

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
from rhapsody_mcp.serving.unix_sockets import bind_unix_socket, is_same_file

__all__ = ["Listener", "listen_on_host", "listen_on_socket"]

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Listener:
    """A listening socket. `private` says that the operating system admits only this machine, or only this user;
    `names` are the host names that clients may use, none for a wildcard address."""

    socket: socket.socket
    address: str
    names: tuple[str, ...]
    private: bool


@contextmanager
def listen_on_host(host: str, port: int) -> Iterator[Listener]:
    """Listen until the end of the block; port 0 takes a free port. Raises InvalidSettings where that fails."""
    family, address = _resolve(host, port)
    try:
        listening = socket.create_server(address, family=family)
    except OSError as error:
        in_use = error.errno == errno.EADDRINUSE
        advice = (
            "Another program listens there: choose another --port." if in_use else "Choose another --host or --port."
        )
        raise InvalidSettings(f"{host} port {port} cannot be listened on: {error.strerror}. {advice}") from error
    with listening:
        # Connections inherit TCP_NODELAY. asyncio does not set it, because create_server's sockets have protocol 0;
        # without it a reply in two pieces waits 40 ms for the client's acknowledgement of the first.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ip_address = ipaddress.ip_address(str(address[0]).partition("%")[0])
        is_local = ip_address.is_loopback
        names = () if ip_address.is_unspecified else (host, str(ip_address), *(_LOCAL_NAMES if is_local else ()))
        shown = f"[{host}]" if ":" in host else host
        yield Listener(listening, f"http://{shown}:{listening.getsockname()[1]}/mcp", names, is_local)


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
    """Listen on a Unix socket of mode 0600 until the end of the block, which removes the socket. Replaces the socket
    of a server that was killed.

    Raises InvalidSettings where another server listens, and where another user could replace the socket.
    """
    try:
        _check_folder(path.parent)
        _remove_stale(path)
        listening = bind_unix_socket(path)
    except OSError as error:
        reason = error.strerror or str(error)  # a path that is too long has no strerror
        raise InvalidSettings(f"the socket {path} cannot be made: {reason}. Choose another --socket.") from error
    info = path.lstat()
    try:
        with listening:
            yield Listener(listening, f"http://localhost/mcp on the socket {path}", _LOCAL_NAMES, True)
    finally:
        if is_same_file(path, info):
            with suppress(OSError):
                path.unlink()


def _check_folder(folder: Path) -> None:
    info = folder.stat()
    is_trusted = info.st_uid in (0, os.geteuid())
    is_shared = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not info.st_mode & stat.S_ISVTX
    if not is_trusted or is_shared:
        raise InvalidSettings(
            f"others can replace a socket in {folder}. Choose a --socket in a folder that only you can write."
        )


def _remove_stale(path: Path) -> None:
    """Remove a socket without a server. A file of another kind stays, so that binding fails."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise InvalidSettings(f"a server listens on the socket {path} already. Choose another --socket.")
