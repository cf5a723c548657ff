"""Which kind of file system a folder is on, and what that means for a database in it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["file_system", "is_network"]

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    "9p afpfs afs beegfs ceph cifs coda daos dvs fuse gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs panfs "
    "pvfs2 smb2 smb3 smbfs vboxsf virtiofs wekafs".split()
)


def file_system(folder: Path) -> str:
    """Its type, as in `ext4` or `nfs4`; empty where the system does not tell (anything but Linux)."""
    if not _MOUNTS.is_file():
        return ""
    mounts = _mounts()
    return _type_of_device(folder.stat().st_dev, mounts) or _type_of_path(folder.resolve(), mounts)


def is_network(kind: str) -> bool:
    """Whether other machines may see this file system too; of FUSE (`fuse.sshfs`) nobody can say that they do not."""
    return kind.partition(".")[0] in _NETWORK


class _Mount(NamedTuple):
    device: str
    place: Path
    kind: str


def _type_of_device(device: int, mounts: list[_Mount]) -> str:
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((mount.kind for mount in mounts if mount.device == number), "")


def _type_of_path(path: Path, mounts: list[_Mount]) -> str:
    """Of the last mount on the longest way to it: some file systems (btrfs) show other numbers there."""
    on_the_way = [mount for mount in mounts if path.is_relative_to(mount.place)]
    return max(on_the_way[::-1], key=lambda mount: len(mount.place.parts)).kind if on_the_way else ""


def _mounts() -> list[_Mount]:
    found = []
    for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        found.append(_Mount(fields[2], Path(_unescaped(fields[4])), after.split()[0]))
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), text)
