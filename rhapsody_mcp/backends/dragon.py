"""The backend that runs functions and programs through Dragon, on one node."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal

from rhapsody_mcp.backends.compute.backend import ComputeBackend, path_of_tasks
from rhapsody_mcp.engine.node.launchers import TASK_VARIABLES
from rhapsody_mcp.engine.node.pmi import link_bundled_pmix
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings
from rhapsody_mcp.model.specs import Caps

__all__ = ["DragonExecutionBackendV3"]


class DragonExecutionBackendV3(ComputeBackend):
    """Runs tasks in processes that Dragon launches; native functions in long-lived workers, or through Dragon's Batch.

    The Dragon runtime is a process tree of its own, also where Dragon manages this process; this process loads no
    Dragon library. `await backend` returns when Dragon can launch processes.
    """

    launcher = "dragon"
    alternative = (
        ', or go to the local backend, which runs the same tasks: backends=["local"], in Python LocalExecutionBackend()'
    )

    def __init__(
        self,
        num_workers: int | None = None,
        *,
        num_nodes: int = 1,
        dispatch: Literal["workers", "batch"] = "workers",
        name: str = "dragon",
        stall_s: float = 10.0,
        environment: Mapping[str, Any] | None = None,
        caps: Caps | None = None,
    ) -> None:
        """Without `num_workers` there is one worker for each core.

        With `dispatch="batch"`, Dragon's Batch scheduler starts native functions in bundles of up to 64, each bundle in
        a process of its own. The guarantees are the same; short functions are much slower.
        """
        super().__init__(num_workers, name, stall_s, environment, caps)
        if num_nodes != 1:
            raise InvalidSettings(f"num_nodes is {num_nodes!r}; this version runs on one node, num_nodes=1.")
        if dispatch not in ("workers", "batch"):
            raise InvalidSettings(f'dispatch is {dispatch!r}; valid: "workers", "batch".')
        self.dispatch = dispatch

    def _refuse_to_start(self) -> None:
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

    def _host_environment(self, folder: Path, environment: dict[str, str]) -> dict[str, str]:
        environment = {name: value for name, value in environment.items() if "DRAGON" not in name}
        # the engine's folder is deleted with the engine, and with it the temporary files that Dragon leaves
        launcher_variables = {"TMPDIR": str(folder), **link_bundled_pmix(folder / "lib", environment)}
        if "USER" in environment:  # Dragon names files in /dev/shm after USER, or without USER after the user's id
            launcher_variables["USER"] = str(os.getuid())
        inherited = {"TMPDIR": gettempdir(), "LD_LIBRARY_PATH": "", **environment}
        task_variables = {name: inherited[name] for name in launcher_variables}
        task_variables["PATH"] = path_of_tasks(environment)
        _write_config_shim(folder / "bin")
        launcher_variables["PATH"] = os.pathsep.join(
            [str(folder / "bin"), str(Path(sys.executable).parent), task_variables["PATH"]]
        )
        return {**environment, **launcher_variables, TASK_VARIABLES: json.dumps(task_variables)}


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
    folder.mkdir()
    shim = folder / "dragon-config"
    shim.write_text("\n".join(script) + "\n")
    shim.chmod(0o755)
