"""Identifies the peer of a connection with the operating system's own means."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = ["Peer", "peer_pid_and_uid"]

_ESTABLISHED = "01"


def peer_pid_and_uid(connection: socket.socket) -> tuple[int | None, int]:
    """The pid and the uid of the process that connected to this Unix socket, at the time of the connection.

    Without SO_PEERCRED: no pid and this process's uid, because the socket's mode admits no other user.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return None, os.geteuid()
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


@dataclass(frozen=True)
class Peer:
    """The other end of a connection: a network address, or the process at a Unix socket."""

    local_address: tuple[str, int] | None
    remote_address: tuple[str, int] | None
    pid: int | None = None
    socket_uid: int | None = None
    """The uid of the process at a Unix socket."""

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        if connection.family == socket.AF_UNIX:
            pid, uid = peer_pid_and_uid(connection)
            return cls(None, None, pid, uid)
        return cls(connection.getsockname()[:2], connection.getpeername()[:2])

    @cached_property
    def uid(self) -> int | None:
        """The user at the other end, if the peer is on this machine and still connected.

        None for a peer on another machine, and on systems without /proc: such a client must send a token.
        """
        if self.socket_uid is not None or self.local_address is None or self.remote_address is None:
            return self.socket_uid
        return _socket_owner(_kernel_address(*self.remote_address), _kernel_address(*self.local_address))

    @property
    def is_same_user(self) -> bool:
        """Whether the peer runs as this process's user; every local user can connect to a local port."""
        return self.uid == os.geteuid()

    @property
    def host(self) -> str:
        return self.remote_address[0] if self.remote_address else f"uid {self.uid}"

    def __str__(self) -> str:
        if self.remote_address:
            return f"{self.remote_address[0]} port {self.remote_address[1]}"
        return f"uid {self.uid}, pid {self.pid}"


def _socket_owner(local: str, remote: str) -> int | None:
    """The uid that owns the established socket with these two addresses; a closed socket would count as root's."""
    for line in _socket_table():
        _, local_address, remote_address, state, _, _, _, uid, *_ = line.split()
        if local_address == local and remote_address == remote and state == _ESTABLISHED:
            return int(uid)
    return None


def _socket_table() -> Iterator[str]:
    for table in ("tcp", "tcp6"):
        try:
            yield from Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue


def _kernel_address(host: str, port: int) -> str:
    """An address in the form of /proc/net/tcp: 32-bit words in hexadecimal, each in the machine's byte order."""
    packed = ipaddress.ip_address(host.partition("%")[0]).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
