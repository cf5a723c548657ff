"""A program in the place of ssh, and hosts in the place of machines: folders of this machine."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

__all__ = ["SshStandIn"]


_PROGRAM = r"""
[ "$1" != -V ] || { echo OpenSSH_9.2 >&2; exit; }
all="$*"
while [ "${1#-}" != "$1" ]; do [ "$1" != -o ] || shift; shift; done
folder=FOLDER/hosts/${1#*@}
[ -d "$folder" ] || { echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255; }
[ ! -f "$folder/down" ] || { echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255; }
echo "$all" >>"$folder/ssh-arguments"
export TMPDIR="$folder" STAND_IN_HOST="$(cat "$folder/name")" PATH=FOLDER/bin:"$PATH"
shift
exec sh -c "$*"
"""


class SshStandIn:
    """Runs what it is asked for on this machine, with a host name and a folder of temporary files for each host. It is
    on PATH until the end of the test. Each host has a file `ssh-arguments` with the command lines of ssh."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *hosts: str) -> None:
        self.folder = folder / "hosts"
        self.folder.mkdir()
        patch.setenv("PATH", f"{self.folder}{os.pathsep}{os.environ['PATH']}")
        for name in [name for name in os.environ if name.startswith(("SLURM_", "PBS_", "RHAPSODY_"))]:
            patch.delenv(name)
        (self.folder / "bin").mkdir()
        self._write("bin/uname", ['[ "$1" != -n ] || { echo "$STAND_IN_HOST"; exit; }', 'exec /bin/uname "$@"'])
        self._write("ssh", _PROGRAM.replace("FOLDER", shlex.quote(str(self.folder))).splitlines())
        for host in hosts:
            self.add(host)

    def add(self, host: str, own_name: str = "") -> None:
        (self.host(host)).mkdir(parents=True)
        (self.host(host) / "name").write_text(own_name or host)

    def host(self, host: str) -> Path:
        return self.folder / "hosts" / host

    def switch_off(self, host: str) -> None:
        (self.host(host) / "down").touch()

    def _write(self, name: str, lines: list[str]) -> None:
        file = self.folder / name
        file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        file.chmod(0o755)
