"""The two ways to start a process on a node: through Dragon, or as a child."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rhapsody_mcp.engine.processes import PLACE, marked
from rhapsody_mcp.model.specs import Template

__all__ = ["DragonPlacer", "LocalPlacer", "Placed", "Placer", "count_gpus"]


class Placed(Protocol):
    """A process that was started."""

    def join(self) -> int:
        """Wait for its end, from any thread; its exit code, negative for a signal."""

    def terminate(self) -> None:
        """Send it TERM; nothing happens where it has ended."""


class Placer(Protocol):
    sets_affinity: bool
    """Whether a placed process has to bind itself to CPUs and GPUs."""

    def place(self, arguments: list[str], env: dict[str, str], template: Template) -> Placed:
        """Start a program with these variables added, PLACE among them; from any thread."""


class LocalPlacer:
    """Starts children of this process."""

    sets_affinity = True

    def place(self, arguments: list[str], env: dict[str, str], template: Template) -> Placed:
        return _Child(
            subprocess.Popen(
                arguments,
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )


class _Child:
    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    def join(self) -> int:
        return self._child.wait()

    def terminate(self) -> None:
        self._child.terminate()


class DragonPlacer:
    """Starts Dragon processes, where Dragon's policies say.

    Their standard streams are /dev/null: Dragon reads a pipe for each other kind, and a grandchild that keeps
    such a pipe open holds up every later start on its node.
    """

    sets_affinity = False

    def __init__(self) -> None:
        from dragon.infrastructure.policy import Policy
        from dragon.native.process import Process

        self._process, self._policy = Process, Policy
        self._starting = threading.Lock()

    def place(self, arguments: list[str], env: dict[str, str], template: Template) -> Placed:
        process = self._process(
            target=arguments[0],
            args=arguments[1:],
            env=env,
            cwd=os.getcwd(),
            stdout=self._process.DEVNULL,
            stderr=self._process.DEVNULL,
            policy=self._policy_of(template),
        )
        with self._starting:
            process.start()
        return _DragonProcess(process, env[PLACE])

    def _policy_of(self, template: Template) -> Any:
        placement = self._policy.Placement
        return self._policy(
            placement=placement.HOST_NAME if template.host_name else placement.DEFAULT,
            host_name=template.host_name or "",
            cpu_affinity=list(template.cpu_affinity),
            gpu_affinity=list(template.gpu_affinity),
        )


class _DragonProcess:
    def __init__(self, process: Any, place: str) -> None:
        self._process, self._place = process, place

    def join(self) -> int:
        self._process.join()
        return int(self._process.returncode)

    def terminate(self) -> None:
        """By the kernel, not by Dragon: after a Dragon kill its launcher spins at the end and never ends."""
        for pid in marked(PLACE, self._place):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)


def count_gpus() -> int:
    """The GPUs of this node whose drivers show device files; no library is loaded."""
    devices = Path("/dev")
    nvidia = [path for path in devices.glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    amd = Path("/sys/class/kfd/kfd/topology/nodes")
    if nvidia or not amd.is_dir():
        return len(nvidia)
    return sum("simd_count 0" not in (node / "properties").read_text() for node in amd.iterdir())


def this_host(name: str | None) -> bool:
    """Whether a policy's host_name means this node."""
    return name in (None, socket.gethostname(), socket.gethostname().split(".")[0], "localhost")
