"""The backend that runs functions and programs through Dragon."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal

import platformdirs

from rhapsody_mcp.backends.compute.backend import ComputeBackend, path_of_tasks
from rhapsody_mcp.backends.compute.nodes.engine import NodesConfig
from rhapsody_mcp.engine.network.addresses import dragon_network_prefix
from rhapsody_mcp.engine.node.launchers import TASK_VARIABLES
from rhapsody_mcp.engine.node.pmi import link_pmix
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings
from rhapsody_mcp.model.specs import Caps

__all__ = ["DragonExecutionBackendV3"]

_NODES_START_LIMITS_S = (180.0, 360.0)
"""As `start_limits_s`. Dragon 0.15 took 31 to 90 s to start on two nodes, and hangs where one of its agents takes more
than 10 s."""


class DragonExecutionBackendV3(ComputeBackend):
    """Runs tasks in processes that Dragon launches; native functions in long-lived workers, or through Dragon's Batch.

    The Dragon runtime is a process tree of its own, also where Dragon manages this process; this process loads no
    Dragon library. `await backend` returns when Dragon can launch processes.
    """

    launcher = "dragon"
    slurm_only = True
    alternative = (
        ', or go to the local backend, which runs the same tasks: backends=["local"], in Python LocalExecutionBackend()'
    )

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        num_nodes: int | None = None,
        network_prefix: str | None = None,
        dispatch: Literal["workers", "batch"] = "workers",
        name: str = "dragon",
        stall_s: float = 10.0,
        environment: Mapping[str, Any] | None = None,
        caps: Caps | None = None,
    ) -> None:
        """Without `num_workers` there is one worker for each core; without `num_nodes`, the backend runs on all nodes
        of the allocation that this process is in. `network_prefix` is a regular expression for the names of the network
        interfaces that connect the nodes; the default is the fast networks of known machines, else the interface with
        the address of this node's name.

        With `dispatch="batch"`, Dragon's Batch scheduler starts native functions in bundles of up to 64, each bundle in
        a process of its own. The guarantees are the same; short functions are much slower.
        """
        super().__init__(num_workers, name, stall_s, environment, caps, num_nodes, network_prefix)
        if self.num_nodes > 1:
            self.start_limits_s = _NODES_START_LIMITS_S
        if dispatch not in ("workers", "batch"):
            raise InvalidSettings(f'dispatch is {dispatch!r}; valid: "workers", "batch".')
        self.dispatch = dispatch

    def _refuse_to_start(self) -> None:
        super()._refuse_to_start()
        if os.environ.get("DRAGON_MODE") == "crayhpe-multi":
            raise InvalidSettings(
                "this process runs inside a Dragon runtime of several nodes, where no second one can start. "
                "Start your program with plain python inside the allocation; the backend starts Dragon itself."
            )
        if find_spec("dragon") is None or _find_launcher() is None:
            raise BackendUnavailable(
                "Dragon is not installed in this Python environment. Install it with: pip install "
                "'dragonhpc[batch,telemetry]' (Linux, Python 3.11 to 3.13); without it, LocalExecutionBackend "
                "(backend 'local') runs the same tasks on this machine."
            )

    def _host_command(self, config: Path) -> list[str]:
        launcher = _find_launcher()
        assert launcher is not None
        # -s is single-node mode: without -s, dragon fails where srun is on PATH and there is no allocation
        return [launcher, "-s", sys.executable, "-m", "rhapsody_mcp.engine.host", str(config)]

    def _nodes_config(self) -> NodesConfig:
        launcher = _find_launcher()
        assert launcher is not None
        nodes, prefix = self.nodes.names(), self.network_prefix or dragon_network_prefix()
        command = [
            *[launcher, "-m", "-w", "slurm", "-t", "tcp", "-N", str(len(nodes)), "--network-prefix", prefix],
            *[sys.executable, "-m", "rhapsody_mcp.engine.head"],
        ]
        return NodesConfig(nodes, command, prefix, leaves_files=True, needs_host_file=self.nodes.are_some(nodes))

    def _host_environment(self, folder: Path, environment: dict[str, str]) -> dict[str, str]:
        environment = {name: value for name, value in environment.items() if "DRAGON" not in name}
        # the engine's folder is deleted with the engine, and with it the temporary files that Dragon leaves
        one_node = {"TMPDIR": str(folder)}
        many_nodes = {
            "SLURM_WORKING_DIR": gettempdir(),
            "SLURM_NO_KILL": "set",  # its steps outlive a node
            "SLURM_OVERLAP": "set",  # the steps of a killed engine may never end where a node is dead
        }
        launcher_variables = one_node if self.num_nodes == 1 else many_nodes
        shared = folder if self.num_nodes == 1 else _shared_folder()
        launcher_variables |= link_pmix(shared / "lib", environment)
        if "USER" in environment:  # Dragon names files in /dev/shm after USER, or without USER after the user's id
            launcher_variables["USER"] = str(os.getuid())
        empty = dict.fromkeys(("LD_LIBRARY_PATH", *many_nodes), "")
        inherited = {**empty, "TMPDIR": gettempdir(), **environment}
        task_variables = {name: inherited[name] for name in launcher_variables}
        task_variables["PATH"] = path_of_tasks(environment)
        _write_config_shim(shared / "bin")
        launcher_variables["PATH"] = os.pathsep.join(
            [str(shared / "bin"), str(Path(sys.executable).parent), task_variables["PATH"]]
        )
        return {**environment, **launcher_variables, TASK_VARIABLES: json.dumps(task_variables)}


def _shared_folder() -> Path:
    """A folder of this user for files that Dragon needs on all nodes; a node that does not see it starts slower."""
    folder = platformdirs.user_cache_path("rhapsody-mcp") / f"dragon-{version('dragonhpc')}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _find_launcher() -> str | None:
    beside = Path(sys.executable).parent / "dragon"
    return str(beside) if beside.exists() else shutil.which("dragon")


def _write_config_shim(folder: Path) -> None:
    """Write a `dragon-config` that answers `--get=KEY` from Dragon's settings file.

    Dragon calls `dragon-config` six times at every start, and Dragon's own program takes 0.6 s.
    """
    real = Path(sys.executable).parent / "dragon-config"
    package = find_spec("dragon")
    assert package is not None and package.origin is not None
    settings = Path(package.origin).parent / ".hsta-config" / "dragon-config.json"
    answers = json.loads(settings.read_text()) if settings.exists() else {}
    cases = [f"--get={shlex.quote(key)}) echo {shlex.quote(str(value))};;" for key, value in answers.items()]
    script = [
        "#!/bin/sh",
        'case "$1" in',
        *cases,
        '--get=*) echo "";;',
        f'*) exec {shlex.quote(str(real))} "$@";;',
        "esac",
    ]
    folder.mkdir(exist_ok=True)
    shim = folder / f"dragon-config.{os.getpid()}"
    shim.write_text("\n".join(script) + "\n")
    shim.chmod(0o755)
    shim.rename(folder / "dragon-config")
