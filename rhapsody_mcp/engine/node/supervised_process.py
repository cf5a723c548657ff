"""A program under a supervisor, as the node agent launches, watches and ends it."""

from __future__ import annotations

import marshal
import signal
import sys
import threading
from pathlib import Path

import msgspec

from rhapsody_mcp.engine.messages import ProcessPlan
from rhapsody_mcp.engine.node.context import NodeContext
from rhapsody_mcp.engine.node.launchers import LaunchedProcess, Launcher, Program
from rhapsody_mcp.engine.process.tree import PROCESS_MARK
from rhapsody_mcp.engine.supervisor import GRACE_S, command
from rhapsody_mcp.model.specs import Template

__all__ = ["SupervisedProcess"]


class SupervisedProcess:
    """A supervisor, which runs what its plan says."""

    def __init__(self, node: NodeContext, template: Template) -> None:
        number = node.next_number()
        self.name = f"p{number}"
        self.path = f"{node.config.folder}/{self.name}"
        self._ended = threading.Event()
        env = {**node.task_env, PROCESS_MARK: f"{node.config.mark}.{number}"}
        self.program = Program(command("supervisor", self.path), env, template)
        self.process: LaunchedProcess
        """The process, once it was launched."""
        self.why_killed = ""
        """Why `kill` ended it."""

    def command_of(self, module: str, config: msgspec.Struct) -> list[str]:
        """The command that runs a module of this package, which finds its configuration in a file."""
        Path(f"{self.path}.config").write_bytes(msgspec.msgpack.encode(config))
        return [sys.executable, "-P", "-m", f"rhapsody_mcp.engine.{module}", f"{self.path}.config"]

    def write_plan(self, plan: ProcessPlan) -> None:
        plan = msgspec.structs.replace(plan, env={**self.program.env, **plan.env})
        Path(self.path).write_bytes(marshal.dumps(msgspec.to_builtins(plan)))

    def launch(self, launcher: Launcher) -> None:
        """Start it by itself; the ranks that a PMI joins are started together, and not by this."""
        self.process = launcher.launch(self.program)

    def join(self) -> int:
        """Wait until it and all that it started has ended; its exit code."""
        code = self.process.join()
        self._ended.set()
        return -signal.SIGKILL if self.why_killed else code

    def kill(self, why: str) -> None:
        """Kill it with its tree, from another thread than the one that joins it."""
        self.why_killed = why
        self.process.kill()

    def stop(self) -> None:
        """End it with its tree, by TERM and after the grace by KILL; returns once the one or the other is sent."""
        self.process.terminate()
        if not self._ended.wait(GRACE_S + 1):
            self.process.kill()
