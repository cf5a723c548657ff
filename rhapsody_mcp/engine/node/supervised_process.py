"""A program under a supervisor: launched, watched and ended by the node agent."""

from __future__ import annotations

import marshal
import signal
import sys
import threading
from pathlib import Path

import msgspec

from rhapsody_mcp.engine.live.progress_file import PROGRESS, ProgressFile
from rhapsody_mcp.engine.messages import ProcessPlan
from rhapsody_mcp.engine.node.context import NodeContext
from rhapsody_mcp.engine.node.launchers import LaunchedProcess, Launcher, Program
from rhapsody_mcp.engine.process.tree import PROCESS_MARK
from rhapsody_mcp.engine.supervisor import GRACE_S, command
from rhapsody_mcp.model.specs import Template

__all__ = ["SupervisedProcess"]


class SupervisedProcess:
    """A supervisor and the program that its plan names."""

    def __init__(self, node: NodeContext, template: Template) -> None:
        number = node.next_process_number()
        self.name = f"p{number}"
        self.path = f"{node.config.folder}/{self.name}"
        self.progress = ProgressFile(f"{self.path}.{PROGRESS}")
        self._ended = threading.Event()
        env = {**node.task_env, PROCESS_MARK: f"{node.config.mark}.{number}"}
        self.program = Program(command("supervisor", self.path), env, template)
        self.process: LaunchedProcess
        """The launched process; unset before the launch."""
        self.kill_reason = ""
        """The reason given to `kill`; empty if `kill` was not called."""
        self.peak_memory_bytes = 0
        """The most memory that was seen in use."""
        self.cpu_s = 0.0
        """The most CPU seconds that were seen of its descendants together."""
        self.exceeded_memory = 0
        """The memory in bytes for which the process was killed; 0 if it was not."""

    def module_command(self, module: str, config: msgspec.Struct) -> list[str]:
        """Write the configuration into a file, and return the command that runs a module of this package with that
        file."""
        Path(f"{self.path}.config").write_bytes(msgspec.msgpack.encode(config))
        return [sys.executable, "-P", "-m", f"rhapsody_mcp.engine.{module}", f"{self.path}.config"]

    def write_plan(self, plan: ProcessPlan) -> None:
        """Write the plan into the file that the supervisor reads; its variables take precedence."""
        fields = msgspec.to_builtins(plan) | {"env": {**self.program.env, **plan.env}}
        with open(self.path, "wb") as file:
            file.write(marshal.dumps(fields))

    def launch(self, launcher: Launcher) -> None:
        """Start the supervisor. The ranks of a group are started together instead, by `launch_group`."""
        self.process = launcher.launch(self.program)

    def join(self) -> int:
        """Wait until the supervisor and its descendants have ended; return its exit code."""
        code = self.process.join()
        self._ended.set()
        return -signal.SIGKILL if self.kill_reason else code

    @property
    def has_ended(self) -> bool:
        """Whether `join` has returned. The same operating system process may supervise another task then."""
        return self._ended.is_set()

    def kill(self, reason: str) -> None:
        """Kill the supervisor and its descendants. Call it from another thread than `join`."""
        self.kill_reason = reason
        self.process.kill()

    def stop(self) -> None:
        """Send TERM, and after the grace period kill the tree. Return when the tree has ended or KILL was sent."""
        self.process.terminate()
        if not self._ended.wait(GRACE_S + 1):
            self.process.kill()
