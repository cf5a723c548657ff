"""What a node agent shares with its tasks and workers: configuration, hardware counts, launchers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import msgspec

from rhapsody_mcp.engine.messages import HostConfig, RanksPrepared
from rhapsody_mcp.engine.node.hardware import count_cores, count_gpus
from rhapsody_mcp.engine.node.launchers import TASK_VARIABLES, ForkLauncher, Launcher
from rhapsody_mcp.engine.node.pmi import PmiProber

__all__ = ["NodeContext"]


class NodeContext:
    """The context of a node agent; all methods are thread-safe."""

    def __init__(
        self,
        config: HostConfig,
        launcher: Launcher,
        fork_launcher: ForkLauncher,
        report_prepared: Callable[[RanksPrepared], None],
    ) -> None:
        """`report_prepared` tells the backend of ranks that a step of the scheduler can start."""
        self.config, self.report_prepared = config, report_prepared
        self.launcher, self.fork_launcher = launcher, fork_launcher
        self.cores, self.gpus = count_cores(), count_gpus()
        self.pmi_prober = PmiProber(config.folder, config.sys_path)
        self.task_env = msgspec.json.decode(os.environ.get(TASK_VARIABLES, "{}"), type=dict[str, str])
        """Variables for launched processes whose values differ from those of this process."""
        self.start_events = start_events_path(config.folder)
        self.is_ending = False
        """Whether the node agent ends everything: what tasks had printed stays in their files, for the owner."""
        self._process_numbers = itertools.count(1)

    def next_process_number(self) -> int:
        """Return a number that no other launched process of this engine has on this node."""
        return next(self._process_numbers)


def start_events_path(folder: str) -> str:
    """Return the path of the datagram socket to which supervisors report that a program started."""
    return f"{folder}/started"
