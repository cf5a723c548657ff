"""The software of a task on a node: found before its ranks start, and put around their commands."""

from __future__ import annotations

import os
import sys

from rhapsody_mcp.engine.messages import RankConfig
from rhapsody_mcp.engine.node.context import NodeContext
from rhapsody_mcp.engine.software.config import write_config
from rhapsody_mcp.engine.software.crossing import refuse_code
from rhapsody_mcp.engine.software.interpreter import Interpreter, find_interpreter
from rhapsody_mcp.engine.software.start import bring_along, command
from rhapsody_mcp.model.specs import TaskRun, Template
from rhapsody_mcp.model.values import version_here

__all__ = ["TaskSoftware"]

_INSTALLED = ("site-packages", "dist-packages")


class TaskSoftware:
    """What a task finds on this node. Raises InvalidTask where that is not here."""

    def __init__(self, node: NodeContext, task_run: TaskRun) -> None:
        self._node, self._task_run = node, task_run
        self._software = task_run.spec.layout.software
        self._python: Interpreter | None = None
        if self._software.python:
            self._python = find_interpreter(self._software.python, node.config.cwd, self._path({}))
            refuse_code(task_run.spec.work, self._python)

    @property
    def needs_rank(self) -> bool:
        """Whether also a program is started by a rank, which finds it after the setup lines have run."""
        return bool(self._software.setup)

    def rank_command(self, path: str) -> list[str]:
        """Write the configuration of the rank with this path, and return the command that runs the rank."""
        config, python = self._node.config, self._python
        sys_path = config.sys_path if python is None else list(filter(_is_users, config.sys_path))
        write_config(f"{path}.config", RankConfig(self._task_run, sys_path, config.caps, version_here()))
        if python is None:
            return [sys.executable, "-P", "-m", "rhapsody_mcp.engine.rank", f"{path}.config"]
        return command(python.path, bring_along(config.folder), f"{path}.config")

    def variables(self, env: dict[str, str | None]) -> dict[str, str | None]:
        """The variables of a rank, of which `env` are those that differ from the node agent's."""
        if self._python is None:
            return env
        return {**self._python.variables, **env, "PATH": self._python.path_with(self._path(env))}

    def wrapped(self, arguments: list[str], path: str, env: dict[str, str | None], template: Template) -> list[str]:
        """The command that runs a rank's command in this software."""
        return arguments

    def _path(self, env: dict[str, str | None]) -> str:
        return env.get("PATH") or self._node.task_env.get("PATH") or os.environ.get("PATH", os.defpath)


def _is_users(folder: str) -> bool:
    """Whether a folder of `sys.path` holds modules of the user, which another Python can import too."""
    own = (sys.prefix, sys.base_prefix)
    return not any(part in folder for part in _INSTALLED) and not folder.startswith(own)
