"""The base class of the Dragon and the local backend, which run functions and programs in an engine."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rhapsody_mcp.backends.base import BackendBase, Kind, Report
from rhapsody_mcp.backends.compute.engine import Engine, EngineConfig
from rhapsody_mcp.backends.compute.in_flight import Node
from rhapsody_mcp.backends.compute.nodes.allocated import AllocatedNodes, PlannedNodes
from rhapsody_mcp.backends.compute.nodes.engine import MultiNodeEngine, NodesConfig
from rhapsody_mcp.backends.compute.placement import refuse_too_large, refuse_too_many_ranks
from rhapsody_mcp.backends.environment import Environment, read_environment
from rhapsody_mcp.backends.shared_run import SharedRun
from rhapsody_mcp.engine.messages import LauncherName, ReadOutput
from rhapsody_mcp.engine.network.addresses import refuse_unknown_network
from rhapsody_mcp.engine.node.hardware import count_gpus, memory_gib
from rhapsody_mcp.engine.software.crossing import refuse_code
from rhapsody_mcp.engine.software.interpreter import find_interpreter
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidRequest, InvalidSettings, InvalidTask
from rhapsody_mcp.model.live.output import OutputQuery, Printed
from rhapsody_mcp.model.specs import Caps, TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Reader

__all__ = ["ComputeBackend", "path_of_tasks"]

_RANKS_A_CORE = 32


class ComputeBackend(BackendBase):
    """Runs up to `num_workers` native functions at a time, and tasks in processes of their own while there is room.

    All share the cores, GPUs and memory of each node. A function takes a core, or less where there are more workers
    than cores; a process takes what its task says it needs, else one core; a job with more such ranks than there are
    cores runs alone. A worker runs its functions one after the other; when the worker dies, only the running function
    fails. A worker or an engine that has been stopped for `stall_s` counts as dead, and so does an engine that has not
    answered for `stall_s`.
    """

    launcher: LauncherName
    dispatch: Literal["workers", "batch"] = "workers"
    """With "batch", a worker is started for each bundle of functions, and ends with the bundle."""
    kinds: Collection[Kind] = ("function", "executable")
    start_limits_s: tuple[float, float] = (60.0, 120.0)
    """The seconds that a first start may take, and a second start after the first has failed. A start takes a few
    seconds; rarely, it hangs."""
    slurm_only: bool = False
    """Whether the backend runs on several nodes in jobs of Slurm alone."""
    num_workers: int
    progress: str = "not started"
    alternative: str = ""
    """The end of an error's text, which names another backend for the same tasks; may be empty."""

    def __init__(
        self,
        num_workers: int | None,
        name: str,
        stall_s: float,
        environment: Mapping[str, Any] | Environment | None = None,
        caps: Caps | None = None,
        num_nodes: int | None = None,
        network_prefix: str | None = None,
    ) -> None:
        self.nodes, self.network_prefix = AllocatedNodes(num_nodes, slurm_only=self.slurm_only), network_prefix
        self.num_nodes = self.nodes.count
        cores = sum(self.nodes.cores)
        max_ranks = _RANKS_A_CORE * cores
        if num_workers is not None and (not isinstance(num_workers, int) or not 1 <= num_workers <= max_ranks):
            raise InvalidSettings(f"num_workers is {num_workers!r}; valid is a whole number from 1 to {max_ranks}.")
        self.name, self.stall_s = name, stall_s
        self.cwd = ""
        self.environment, self.caps = read_environment(environment), caps or Caps()
        self.num_workers = num_workers or cores
        self._slots = num_workers
        self._starting = SharedRun(self._start)
        self._engine: Engine | None = None

    def plan_nodes(self, count: int) -> None:
        """Check tasks for `count` nodes of an allocation that another process will be in; this backend never starts."""
        self.nodes, self.num_nodes = PlannedNodes(count), count
        self.num_workers *= count

    def check(self, spec: TaskSpec) -> None:
        """Raise InvalidTask where the task needs more than there is, names a Python that is not here, or has more ranks
        than the nodes can hold; each rank takes two processes."""
        if spec.layout.mode == "native":
            return
        cores = self.nodes.cores
        refuse_too_large(spec.layout, self._known_nodes)
        refuse_too_many_ranks(spec.layout, len(cores))
        if spec.layout.software.python and not spec.layout.software.container and self._is_here:
            python = find_interpreter(spec.layout.software.python, self.cwd or os.getcwd())
            if not spec.layout.software.packages:  # else they are refused once the environment is there
                refuse_code(spec.work, python.path, python.version_text)
        if spec.layout.ranks > (max_ranks := _RANKS_A_CORE * sum(cores)):
            machine = "this machine" if len(cores) == 1 else f"{len(cores)} nodes"
            raise InvalidTask(
                f"{spec.layout.ranks} ranks are too many for {machine} of {sum(cores)} cores; "
                f"valid is up to {max_ranks} ({_RANKS_A_CORE} a core)."
            )

    @property
    def num_cores(self) -> int | None:  # type: ignore[override]
        return None if isinstance(self.nodes, PlannedNodes) else sum(self.nodes.cores)

    @property
    def _is_here(self) -> bool:
        """Whether this machine is the only node."""
        return self.num_nodes == 1 and not isinstance(self.nodes, PlannedNodes)

    @cached_property
    def _known_nodes(self) -> list[Node]:
        """This machine, where it is the only node; the hardware of other nodes is known once they have joined."""
        if not self._is_here:
            return []
        return [Node(socket.gethostname(), self.nodes.cores[0], gpus=count_gpus(), memory_gib=memory_gib())]

    def _refuse_to_start(self) -> None:
        """Raise InvalidSettings or BackendUnavailable where this machine cannot run the engine."""
        if self.num_nodes > 1 and self.network_prefix is not None:
            refuse_unknown_network(self.network_prefix)

    def _host_command(self, config: Path) -> list[str]:
        """The command that starts the node agent."""
        return [sys.executable, "-m", "rhapsody_mcp.engine.host", str(config)]

    def _nodes_config(self) -> NodesConfig:
        """How node links are started on the nodes of the engine."""
        raise NotImplementedError

    def _host_environment(self, folder: Path, environment: dict[str, str]) -> dict[str, str]:
        """The environment of the node agent, made of `environment`, which is that of the tasks; `folder` is the
        engine's folder."""
        return self._task_environment(environment)

    def _task_environment(self, environment: dict[str, str]) -> dict[str, str]:
        return {**environment, "PATH": path_of_tasks(environment)}

    def work_in(self, folder: str) -> None:
        """Set the working directory of tasks.

        Raises InvalidRequest where the backend has started with another working directory.
        """
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
        await self._starting.join()

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
        engine = self._make_engine()
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

    def _make_engine(self) -> Engine:
        config = self._engine_config()
        if self.num_nodes == 1:
            return Engine(config)
        nodes = self._nodes_config()
        return MultiNodeEngine(config._replace(num_nodes=len(nodes.names)), nodes, self._on_node_lost)

    def _on_node_lost(self, reason: str, host: str | None) -> None:
        if host is not None:
            self.nodes.lose(host)
        self.on_loss(reason)

    def _engine_config(self) -> EngineConfig:
        return EngineConfig(
            backend_name=self.name,
            launcher=self.launcher,
            num_nodes=self.num_nodes,
            slots=self._slots,
            bundles=self.dispatch == "batch",
            stall_s=self.stall_s,
            caps=self.caps,
            cwd=self.cwd,
            environment=self.environment,
            host_command=self._host_command,
            host_environment=self._host_environment,
            task_environment=self._task_environment,
            book=self.book,
            before_start=self.before_start,
            on_loss=self._on_loss,
        )

    def _on_loss(self) -> None:
        self.progress = "ended; the next task starts it anew"

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        if self._engine is None or self._engine.loss is not None:
            raise BackendUnavailable((self._engine and self._engine.loss) or f"backend {self.name!r} is not started.")
        self._engine.submit(task_runs, report)

    def cancel(self, uids: Collection[str]) -> None:
        if self._engine is not None:
            self._engine.dispatcher.stop(uids, Cause.CANCELED)

    async def read_output(self, uid: str, query: OutputQuery) -> Printed | None:
        engine = self._engine
        task = engine.dispatcher.tasks.get(uid) if engine is not None else None
        node, worker = task.place_of(query.rank) if task is not None else (None, "")
        if engine is None or node is None:
            return None
        return await engine.output_reads.ask(lambda number: node.send(ReadOutput(number, uid, worker, query)))

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        if self._engine is not None:
            self._engine.dispatcher.prioritize(priorities)

    def drain(self, reason: str) -> None:
        if self._engine is not None:
            self._engine.dispatcher.drain(reason)

    async def rest(self) -> None:
        if self._engine is not None and self._engine.loss is None:
            self.progress = "at rest; the next task starts it"
            await self._engine.close()

    async def _close(self) -> None:
        await self._starting.cancel()
        if self._engine is not None:
            await self._engine.close()
        self.progress = "closed"

    def describe(self) -> dict[str, Any]:
        described = {"backend": self.name, "runs on": self.launcher, "num_workers": self.num_workers}
        if nodes := self._engine.dispatcher.nodes if self._engine else []:
            described["host"] = ", ".join(node.name for node in nodes)
            described["cores"] = sum(node.cores for node in nodes)
            described["gpus"] = sum(node.gpus for node in nodes)
            described["memory_gb"] = round(sum(node.memory_gb or 0.0 for node in nodes), 1)
        return described


def path_of_tasks(environment: Mapping[str, str]) -> str:
    """The PATH of tasks: the user's own, then the folder of this Python. So each backend finds the same `python3`."""
    folders = [*environment.get("PATH", os.defpath).split(os.pathsep), str(Path(sys.executable).parent)]
    return os.pathsep.join(dict.fromkeys(folders))
