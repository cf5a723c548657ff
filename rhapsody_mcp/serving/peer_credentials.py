"""Finds out who is at the other end of a connection, from the operating system alone."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = ["Peer", "credentials"]

_ESTABLISHED = "01"


def credentials(connection: socket.socket) -> tuple[int | None, int]:
    """The pid and the uid of the process that connected to this Unix socket, when it did.

    Where the system does not tell them: no pid and our own uid, since the mode of the socket lets in nobody else.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return None, os.geteuid()
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


@dataclass(frozen=True)
class Peer:
    """The other end of a connection: its address, or of a Unix socket its process."""

    here: tuple[str, int] | None
    there: tuple[str, int] | None
    pid: int | None = None
    known_uid: int | None = None

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        if connection.family == socket.AF_UNIX:
            pid, uid = credentials(connection)
            return cls(None, None, pid, uid)
        return cls(connection.getsockname()[:2], connection.getpeername()[:2])

    @cached_property
    def uid(self) -> int | None:
        """The user at the other end, where that is on this machine and the connection stands.

        None where it is not, and where the system has no /proc: then who connects to a port must send a token.
        """
        if self.known_uid is not None or self.here is None or self.there is None:
            return self.known_uid
        return _owner(_hex(*self.there), _hex(*self.here))

    @property
    def is_us(self) -> bool:
        """Whether it is the user that this process runs as: anybody on this machine can connect to a local port."""
        return self.uid == os.geteuid()

    @property
    def host(self) -> str:
        return self.there[0] if self.there else f"uid {self.uid}"

    def __str__(self) -> str:
        return f"{self.there[0]} port {self.there[1]}" if self.there else f"uid {self.uid}, pid {self.pid}"


def _owner(local: str, remote: str) -> int | None:
    """Whose socket has these ends. One that its process has closed counts as root's, so it must be connected still."""
    for line in _sockets():
        _, at, to, state, _, _, _, uid, *_ = line.split()
        if at == local and to == remote and state == _ESTABLISHED:
            return int(uid)
    return None


def _sockets() -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        try:
            yield from Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue


def _hex(host: str, port: int) -> str:
    """An address as the kernel writes it in /proc/net/tcp: words of 32 bits, each in the byte order of the machine."""
    packed = ipaddress.ip_address(host.partition("%")[0]).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
