"""Servers of ssh on the nodes of a simulated cluster, which all accept one key of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.cluster.cluster import Cluster

__all__ = ["SshServers"]

_CLIENT = """\
Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  HostKeyAlias nodes
  UserKnownHostsFile {folder}/known_hosts
"""
_SERVER = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
SetEnv PATH={folder}/nodes-bin:/usr/local/bin:/usr/bin:/bin
"""


class SshServers:
    """A context manager; the command `ssh` in the folder `path`, and in `path_of_nodes`, which the nodes have on their
    PATH, has the key and knows the nodes."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.folder = cluster, cluster.shared / "ssh"
        self.path, self.path_of_nodes = self.folder / "bin", self.folder / "nodes-bin"
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.folder.mkdir()
        for name in ("key", "host_key"):
            self._run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"nodes {key}")
        pairs = [line.split() for line in (self.cluster.folder / "hosts").read_text().splitlines()]
        names = "".join(f"Host {name}\n  HostName {address}\n" for address, name in pairs if name in self.cluster.nodes)
        (self.folder / "config").write_text(names + _CLIENT.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(_SERVER.format(folder=self.folder))
        for folder in (self.path, self.path_of_nodes):
            folder.mkdir()
            (folder / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {self.folder}/config "$@"\n')
            (folder / "ssh").chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        for node in self.cluster.nodes:
            self.start(node)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        for node in [*self._servers]:
            self._stop(node)

    def _stop(self, node: str) -> None:
        with self._servers.pop(node) as server:
            server.terminate()

    def start(self, node: str) -> None:
        """Start the server of a node, also where the node was started again; return when it listens."""
        if node in self._servers:
            self._stop(node)
        command = self.cluster.on(node, "/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config"))
        server = self._servers[node] = subprocess.Popen(command, env=self.cluster.environment, stderr=subprocess.PIPE)
        assert server.stderr is not None
        while b"Server listening on 0.0.0.0" not in (line := server.stderr.readline()):
            assert line, f"the server of ssh on {node} did not start"

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
