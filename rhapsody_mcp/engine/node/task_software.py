"""The software of a task on a node: found before its ranks start, and put around their commands."""

from __future__ import annotations

import os
import sys

from rhapsody_mcp.engine.messages import RankConfig
from rhapsody_mcp.engine.node.context import NodeContext
from rhapsody_mcp.engine.software.config import write_config
from rhapsody_mcp.engine.software.containers import Container, find_container, passed_on
from rhapsody_mcp.engine.software.crossing import refuse_code
from rhapsody_mcp.engine.software.interpreter import Interpreter, find_interpreter
from rhapsody_mcp.engine.software.setup_lines import PATH_BEFORE, with_setup
from rhapsody_mcp.engine.software.start import bring_along, brought_folders, command
from rhapsody_mcp.model.specs import TaskRun, Template
from rhapsody_mcp.model.values import version_here

__all__ = ["TaskSoftware"]

_INSTALLED = ("site-packages", "dist-packages")
_Variables = dict[str, str | None]


class TaskSoftware:
    """What a task finds on this node. Raises InvalidTask where that is not here."""

    def __init__(self, node: NodeContext, task_run: TaskRun) -> None:
        self._node, self._task_run = node, task_run
        self._software = software = task_run.spec.layout.software
        self._python: Interpreter | None = None
        self._container: Container | None = None
        if software.container:
            self._container = find_container(
                software.container,
                node.config.cwd,
                self._path({}),
                software.runtime,
                after_setup=bool(software.setup),
            )
        elif software.python:
            self._python = python = find_interpreter(software.python, node.config.cwd, self._path({}))
            refuse_code(task_run.spec.work, python.path, python.version_text)

    @property
    def needs_rank(self) -> bool:
        """Whether also a program is started by a rank, which finds it after the setup lines have run."""
        return bool(self._software.setup) and self._container is None

    def rank_command(self, path: str) -> list[str]:
        """Write the configuration of the rank with this path, and return the command that runs the rank."""
        config, is_own = self._node.config, self._python is None and self._container is None
        sys_path = config.sys_path if is_own else list(filter(_is_users, config.sys_path))
        write_config(f"{path}.config", RankConfig(self._task_run, sys_path, config.caps, version_here()))
        if is_own:
            return [sys.executable, "-P", "-m", "rhapsody_mcp.engine.rank", f"{path}.config"]
        python = self._python.path if self._python is not None else self._software.python or "python3"
        return command(python, bring_along(config.folder), f"{path}.config")

    def around(
        self, arguments: list[str], path: str, env: _Variables, template: Template
    ) -> tuple[list[str], _Variables]:
        """The command of the rank with this path in its software, and its variables, of which `env` are those that
        differ from the node agent's."""
        variables = {**env, **template.env}
        if self._python is not None:
            if arguments[0] in _ANY_PYTHON:
                arguments = [self._python.path, *arguments[1:]]
            path_variable = self._python.path_with(self._path(variables))
            variables = {**self._python.variables, **variables, "PATH": path_variable}
        if self._container is not None:
            arguments = self._in_container(self._container, arguments, variables, template)
            variables = self._container.variables(variables)
        if self._software.setup:
            arguments = with_setup(self._software.setup, path, arguments)
            variables[PATH_BEFORE] = self._path(variables)
        return arguments, variables

    def _in_container(
        self, container: Container, arguments: list[str], variables: _Variables, template: Template
    ) -> list[str]:
        config, work_dir = self._node.config, self._node.config.cwd
        cwd = os.path.normpath(os.path.join(work_dir, template.cwd or ""))
        folders = [cwd, work_dir, config.folder, self._task_run.results_folder, *brought_folders()]
        names = passed_on(variables, template.env)
        return container.command(arguments, folders, cwd, names, has_gpus=bool(self._node.gpus))

    def _path(self, env: _Variables) -> str:
        return env.get("PATH") or self._node.task_env.get("PATH") or os.environ.get("PATH", os.defpath)


_ANY_PYTHON = ("python", "python3")


def _is_users(folder: str) -> bool:
    """Whether a folder of `sys.path` holds modules of the user, which another Python can import too."""
    own = (sys.prefix, sys.base_prefix)
    return not any(part in folder for part in _INSTALLED) and not folder.startswith(own)
