"""The type of a folder's file system."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

__all__ = ["file_system", "is_network"]

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK_TYPES = frozenset(
    "9p afpfs afs beegfs ceph cifs coda daos dvs fuse gfs2 glusterfs gpfs lustre ncpfs nfs nfs4 ocfs2 orangefs panfs "
    "pvfs2 smb2 smb3 smbfs vboxsf virtiofs wekafs".split()
)


def file_system(folder: Path) -> str:
    """The type, as in `ext4` or `nfs4`; empty on other systems than Linux."""
    if not _MOUNTS.is_file():
        return ""
    mounts = _mounts()
    return _type_of_device(folder.stat().st_dev, mounts) or _type_of_path(folder.resolve(), mounts)


def is_network(kind: str) -> bool:
    """Whether other machines may use this file system too. FUSE (`fuse.sshfs`) counts as shared."""
    return kind.partition(".")[0] in _NETWORK_TYPES


class _Mount(NamedTuple):
    device: str
    path: Path
    kind: str


def _type_of_device(device: int, mounts: list[_Mount]) -> str:
    number = f"{os.major(device)}:{os.minor(device)}"
    return next((mount.kind for mount in mounts if mount.device == number), "")


def _type_of_path(path: Path, mounts: list[_Mount]) -> str:
    """The type at the deepest mount point above the path, for file systems (btrfs) with device numbers of their own."""
    above = [mount for mount in mounts if path.is_relative_to(mount.path)]
    return max(above[::-1], key=lambda mount: len(mount.path.parts)).kind if above else ""


def _mounts() -> list[_Mount]:
    mounts = []
    for line in _MOUNTS.read_text(errors="surrogateescape").splitlines():
        mount_fields, _, file_system_fields = line.partition(" - ")
        fields = mount_fields.split()
        mounts.append(_Mount(fields[2], Path(_unescaped(fields[4])), file_system_fields.split()[0]))
    return mounts


def _unescaped(text: str) -> str:
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), text)
