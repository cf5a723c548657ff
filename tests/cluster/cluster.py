"""A Slurm cluster of simulated nodes on this machine, from `cluster.sh`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Cluster", "missing"]

SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "nsenter", "unshare", "pgrep")


def missing() -> str:
    """What this machine lacks for a cluster; empty where a cluster can start."""
    if os.geteuid() != 0:
        return "a simulated cluster needs root"
    if any(Path(folder).resolve().is_relative_to("/tmp") for folder in (sys.prefix, __file__)):
        return "a simulated cluster needs this package and its Python outside of /tmp, which its nodes do not share"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"a simulated cluster needs {', '.join(absent)}" if absent else ""


class Cluster:
    """A context manager: the cluster ends with the block, and also when this process dies."""

    def __init__(self, nodes: int, *, number: int | None = None, gpus: int = 0, cpus: int = 2) -> None:
        self.number = int(os.environ.get("CLUSTER_ID", "0")) if number is None else number
        self.folder = Path(f"/run/simcluster{self.number}")
        self.nodes = [f"c{self.number}node{index}" for index in range(1, nodes + 1)]
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "CLUSTER_ID": str(self.number),
            "CLUSTER_GPUS": str(gpus),
            "CLUSTER_CPUS": str(cpus),
        }
        """The variables that Slurm's commands need to find this cluster."""

    @property
    def shared(self) -> Path:
        """A folder that all nodes see; each node has a /tmp of its own."""
        return self.folder / "shared"

    def __enter__(self) -> Self:
        self._holder = subprocess.Popen(
            [SCRIPT, "hold", str(len(self.nodes))],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            self.__exit__(None, None, None)
            raise RuntimeError("the simulated cluster did not start: its reason stands on stderr")
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        with self._holder:  # closes the pipe, upon which the cluster ends, and waits for the end
            pass

    def kill(self, node: str) -> None:
        """Cut the power of the node: its peers get no message."""
        self._do("kill", node)

    def start(self, node: str) -> None:
        """Boot a node that was killed."""
        self._do("start", node)

    def has_power(self, node: str) -> bool:
        return (self.folder / node / "outer").exists()

    def cut(self, node: str) -> None:
        """Disconnect the network of the node."""
        self._do("cut", node)

    def mend(self, node: str) -> None:
        """Connect the network of the node again."""
        self._do("mend", node)

    def stop_controller(self) -> None:
        """Stop slurmctld; running jobs go on."""
        self._do("controller", "stop")

    def start_controller(self) -> None:
        """Start slurmctld again, with the jobs that were there."""
        self._do("controller", "start")

    def on(self, node: str, *command: str) -> list[str]:
        """The command line that runs `command` on the node, for a process with the variables of `environment`."""
        return [str(SCRIPT), "exec", node, *command]

    def run(self, *command: str) -> str:
        """Run a command on the login node; return the stdout. Raises CalledProcessError."""
        ended = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
        return ended.stdout

    def wait_until_idle(self, within_s: float = 90) -> None:
        """Wait until all nodes can take jobs: after a cut or a kill they are down for a while."""
        deadline = time.monotonic() + within_s
        while self.run("sinfo", "-h", "-p", "batch", "-t", "idle", "-o", "%D").strip() != str(len(self.nodes)):
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l")
            time.sleep(0.5)

    def _do(self, *arguments: str) -> None:
        subprocess.run([SCRIPT, *arguments], env=self.environment, check=True)
