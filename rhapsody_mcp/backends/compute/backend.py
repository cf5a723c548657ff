"""Runs functions and programs in processes of an engine: what the Dragon and the local backend share."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rhapsody_mcp.backends.base import BackendBase, Kind, Report
from rhapsody_mcp.backends.compute.engine import Engine, EngineConfig
from rhapsody_mcp.backends.environment import Environment, read_environment
from rhapsody_mcp.engine.messages import LauncherName
from rhapsody_mcp.engine.node.hardware import count_cores
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidRequest, InvalidSettings, InvalidTask
from rhapsody_mcp.model.specs import Caps, TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Reader

__all__ = ["ComputeBackend", "path_of_tasks"]

_RANKS_A_CORE = 32


class ComputeBackend(BackendBase):
    """Runs up to `num_workers` native functions at a time, and up to as many tasks in processes of their own.

    A job counts for as many as it has ranks; one with more ranks than `num_workers` runs alone. A worker runs its
    functions one after the other; when it dies, only the running one fails. A worker, or an engine, that has been
    stopped for `stall_s`, or an engine that has not answered for so long, counts as dead.
    """

    launcher: LauncherName
    dispatch: Literal["workers", "batch"] = "workers"
    """With batch, a worker is started for a bundle of functions and ends with it."""
    kinds: Collection[Kind] = ("function", "executable")
    start_limits_s: tuple[float, float] = (60.0, 120.0)
    """How long a start may take, and a second one where the first failed: rarely, one of a few seconds hangs."""
    num_workers: int
    progress: str = "not started"
    alternative: str = ""
    """What else runs the same tasks."""

    def __init__(
        self,
        num_workers: int | None,
        name: str,
        stall_s: float,
        environment: Mapping[str, Any] | Environment | None = None,
        caps: Caps | None = None,
    ) -> None:
        self._cores = count_cores()
        most = _RANKS_A_CORE * self._cores
        if num_workers is not None and (not isinstance(num_workers, int) or not 1 <= num_workers <= most):
            raise InvalidSettings(f"num_workers is {num_workers!r}; valid is a whole number from 1 to {most}.")
        self.name, self.stall_s = name, stall_s
        self.cwd = ""
        self.environment, self.caps = read_environment(environment), caps or Caps()
        self.num_workers = num_workers or self._cores
        self._starting: asyncio.Task[None] | None = None
        self._engine: Engine | None = None

    def check(self, spec: TaskSpec) -> None:
        """Refuses more ranks than this node can hold at once: each is two processes."""
        if spec.layout.ranks > (most := _RANKS_A_CORE * self._cores):
            raise InvalidTask(
                f"{spec.layout.ranks} ranks are too many for this machine of {self._cores} cores; "
                f"valid is up to {most} ({_RANKS_A_CORE} a core)."
            )

    def _refuse_to_start(self) -> None:
        """Raise where this machine cannot run the engine."""

    def _host_command(self, config: Path) -> list[str]:
        """The command that runs the host program."""
        return [sys.executable, "-m", "rhapsody_mcp.engine.host", str(config)]

    def _host_environment(self, folder: Path, environment: dict[str, str]) -> dict[str, str]:
        """The environment of the host program, made of that of the tasks; `folder` is the engine's own."""
        return {**environment, "PATH": path_of_tasks(environment)}

    def work_in(self, folder: str) -> None:
        """Raises InvalidRequest where tasks start in another folder already."""
        if self._engine is not None and folder != self.cwd:
            raise InvalidRequest(
                f"backend {self.name!r} has started, and its tasks start in {self.cwd or os.getcwd()}; "
                "give work_dir with a backend that has not been awaited."
            )
        self.cwd = folder

    async def start(self) -> None:
        if self._closing is not None:
            raise BackendUnavailable(f"backend {self.name!r} is closed; make a new one.")
        if self._engine is not None and self._engine.loss is None:
            return
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(self._started)
        await asyncio.shield(self._starting)

    def _started(self, _: asyncio.Task[None]) -> None:
        self._starting = None

    async def _start(self) -> None:
        self._refuse_to_start()
        self.progress = "starting"
        if self._engine is not None:
            await self._engine.ended()
        first_s, second_s = self.start_limits_s
        try:
            try:
                self._engine = await self._new_engine(first_s)
            except BackendUnavailable as error:
                late = isinstance(error.__cause__, TimeoutError)
                self.progress = (
                    f"starting again, the first start {f'took more than {first_s:.0f} s' if late else 'failed'}"
                )
                self._engine = await self._new_engine(second_s)
        except BaseException:
            self.progress = "did not start"
            raise
        self.progress = "ready"

    async def _new_engine(self, limit_s: float) -> Engine:
        engine = Engine(self._engine_config())
        try:
            await engine.start(limit_s)
        except BackendUnavailable as error:
            await engine.close()
            again = "Try again: tasks that are submitted again, under the same names, start the engine anew"
            raise BackendUnavailable(f"{str(error).rstrip('.')}. {again}{self.alternative}.") from error.__cause__
        except BaseException:
            await engine.close()
            raise
        return engine

    def _engine_config(self) -> EngineConfig:
        return EngineConfig(
            backend_name=self.name,
            launcher=self.launcher,
            slots=self.num_workers,
            bundles=self.dispatch == "batch",
            stall_s=self.stall_s,
            caps=self.caps,
            cwd=self.cwd,
            environment=self.environment,
            host_command=self._host_command,
            host_environment=self._host_environment,
            book=self.book,
            before_start=self.before_start,
            on_loss=self._lost,
        )

    def _lost(self) -> None:
        self.progress = "ended; the next task starts it anew"

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        if self._engine is None or self._engine.loss is not None:
            raise BackendUnavailable((self._engine and self._engine.loss) or f"backend {self.name!r} is not started.")
        self._engine.dispatcher.submit(task_runs, report)

    def cancel(self, uids: Collection[str]) -> None:
        if self._engine is not None:
            self._engine.dispatcher.stop(uids, Cause.CANCELED)

    async def rest(self) -> None:
        if self._engine is not None and self._engine.loss is None:
            self.progress = "at rest; the next task starts it"
            await self._engine.close()

    async def _close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._engine is not None:
            await self._engine.close()
        self.progress = "closed"

    def describe(self) -> dict[str, Any]:
        described = {"backend": self.name, "runs on": self.launcher, "num_workers": self.num_workers}
        if nodes := self._engine.dispatcher.nodes if self._engine else []:
            described["host"] = ", ".join(node.name for node in nodes)
            described["cores"] = sum(node.cores for node in nodes)
            described["gpus"] = sum(node.gpus for node in nodes)
        return described


def path_of_tasks(environment: Mapping[str, str]) -> str:
    """The user's own, and last the folder of this Python: `python3` is the same program whatever runs the task."""
    folders = [*environment.get("PATH", os.defpath).split(os.pathsep), str(Path(sys.executable).parent)]
    return os.pathsep.join(dict.fromkeys(folders))
