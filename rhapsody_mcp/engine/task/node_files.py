"""The files of results on a node that may not see the folder of its session.

Where the folder is there, results are written into it. Otherwise they are written into the folder of the node link, and
the backend copies them; files of inputs are copied to this node by the node link.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from msgspec.structs import replace

from rhapsody_mcp.model.specs import TaskRun
from rhapsody_mcp.model.values import Value

__all__ = ["FILES_SOCKET", "RESULTS", "local_bindings", "local_task_run", "results_folder"]

RESULTS = "results"
"""The folder for results in the folder of a node link."""
FILES_SOCKET = "files"
"""The name of the Unix socket in the folder of a node link through which files of inputs are asked for."""


def results_folder(folder: str, link_folder: str) -> str:
    """Return the folder for results on this node; `link_folder` is empty where the engine has one node."""
    return folder if not link_folder or os.path.isdir(folder) else os.path.join(link_folder, RESULTS)


def local_bindings(bindings: Mapping[str, Value], link_folder: str) -> Mapping[str, Value]:
    """Return the bindings with files that this node can read.

    Raises OSError where a file cannot be copied to this node.
    """
    if not link_folder:
        return bindings
    return {
        uid: value.moved({path: _local_path(path, link_folder) for path in value.paths}) if value.paths else value
        for uid, value in bindings.items()
    }


def _local_path(file: str, link_folder: str) -> str:
    if os.path.exists(file):
        return file
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(os.path.join(link_folder, FILES_SOCKET))
        link.sendall(os.fsencode(file) + b"\0")
        with link.makefile("rb") as answer:
            path = os.fsdecode(answer.read())
    if not path:
        raise FileNotFoundError(2, f"an input could not be copied to {socket.gethostname()}: {file}")
    return path


def local_task_run(task_run: TaskRun, link_folder: str) -> TaskRun:
    """Return the task run with a results folder and with inputs of this node. Raises OSError as `local_bindings`."""
    if not link_folder:
        return task_run
    bindings = dict(local_bindings(task_run.bindings, link_folder))
    return replace(task_run, bindings=bindings, results_folder=results_folder(task_run.results_folder, link_folder))
