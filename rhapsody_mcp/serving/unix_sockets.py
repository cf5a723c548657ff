"""Binds Unix sockets, and recognizes a file that has been replaced."""

from __future__ import annotations

import os
import socket
from pathlib import Path

__all__ = ["BACKLOG", "bind_unix_socket", "is_same_file"]

BACKLOG = 1024
"""Connections that may wait to be accepted."""


def bind_unix_socket(path: Path) -> socket.socket:
    """A listening socket of mode 0600. Raises OSError where the path exists or is too long."""
    listener = socket.socket(socket.AF_UNIX)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(umask)
    return listener


def is_same_file(path: Path, info: os.stat_result) -> bool:
    """Whether the path is still the file with this stat result; links are not followed."""
    try:
        return os.path.samestat(path.lstat(), info)
    except OSError:
        return False
