"""What a node agent has for each process that it launches: configuration, hardware, launchers."""

from __future__ import annotations

import itertools
import os

import msgspec

from rhapsody_mcp.engine.messages import HostConfig
from rhapsody_mcp.engine.node.hardware import count_cores, count_gpus
from rhapsody_mcp.engine.node.launchers import TASK_VARIABLES, ForkLauncher, Launcher
from rhapsody_mcp.engine.node.pmi import Prober

__all__ = ["NodeContext"]


class NodeContext:
    """This node; for use from any thread."""

    def __init__(self, config: HostConfig, launcher: Launcher, forks: ForkLauncher) -> None:
        self.config = config
        self.launcher, self.forks = launcher, forks
        self.cores, self.gpus = count_cores(), count_gpus()
        self.prober = Prober(config.folder, config.sys_path)
        self.task_env = msgspec.json.decode(os.environ.get(TASK_VARIABLES, "{}"), type=dict[str, str])
        """Variables of what is launched that have other values in this process."""
        self.start_events = start_events_path(config.folder)
        self._numbers = itertools.count(1)

    def next_number(self) -> int:
        """A number for one process."""
        return next(self._numbers)


def start_events_path(folder: str) -> str:
    """The datagram socket in an engine's folder to which supervisors report starts."""
    return f"{folder}/started"
