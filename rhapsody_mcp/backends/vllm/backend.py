"""The backend that starts vLLM servers on this node and sends prompts to these servers."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from rhapsody_mcp.backends.base import RESTARTS, BackendBase, Kind, Report, restart_delay_s
from rhapsody_mcp.backends.environment import read_environment
from rhapsody_mcp.backends.inference.batching import Limits, read_limits
from rhapsody_mcp.backends.inference.openai_client import RequestRefused, ServerLost
from rhapsody_mcp.backends.inference.prompt_runner import Defaults, PromptRunner, check_prompts
from rhapsody_mcp.backends.local_models import SHIPPED_NOTE
from rhapsody_mcp.backends.vllm.config import Device, VllmConfig, read_config
from rhapsody_mcp.backends.vllm.launch_plan import SCHEMA_OPTIONS, Plan, detect_hardware, find_model, plan_servers
from rhapsody_mcp.backends.vllm.nodes import RemoteServer, ServerNodes, other_hosts, with_share
from rhapsody_mcp.backends.vllm.server import Launch, VllmServer
from rhapsody_mcp.engine.process.run_dirs import RunDir
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidSettings, InvalidTask, RhapsodyError, UnknownName
from rhapsody_mcp.model.specs import Completion, TaskRun, TaskSpec
from rhapsody_mcp.model.values import Reader
from rhapsody_mcp.shipped_model import MODEL_DIR, MODEL_NAME

__all__ = ["DragonVllmInferenceBackend"]

_MAX_BATCH_SIZE = 1024
_MAX_BATCH_WAIT_MS = 500
_HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""The variables for downloads from the Hugging Face hub: the servers get them also where tasks do not."""

_log = logging.getLogger(__name__)


class DragonVllmInferenceBackend(BackendBase):
    """Starts one unmodified vLLM server for each `tp_size` of `num_gpus` GPUs, and distributes prompts among them.

    Server i listens on port `port` + i of 127.0.0.1; `urls` are the OpenAI APIs of the servers, for any client that has
    `api_key`. Each server is a process of this node that sees its own GPUs only (CUDA_VISIBLE_DEVICES); on the CPU,
    each server uses all cores. When a server dies or hangs, the tasks that it had fail, and it is started again after
    1, 2, 4, 8 and 16 s while other servers run; when no server is left, `start` starts all of them again.
    """

    kinds: tuple[Kind, ...] = ("prompt",)

    def __init__(
        self,
        config_file: str | os.PathLike[str] | None = None,
        model_name: str | None = None,
        num_nodes: int | None = None,
        num_gpus: int | None = None,
        tp_size: int | None = None,
        port: int | None = None,
        max_batch_size: int = _MAX_BATCH_SIZE,
        max_batch_wait_ms: int = _MAX_BATCH_WAIT_MS,
        *,
        model: str | None = None,
        device: Device | None = None,
        health_s: float = 5.0,
        environment: Mapping[str, Any] | None = None,
        name: str = "vllm",
    ) -> None:
        """An argument wins over the same setting of `config_file`, which is read when the backend starts.

        config_file        a YAML file that describes model and hardware; `rhapsody-mcp init` writes an example
        model_name         the model's name for tasks, and also the model to load where `model` is not given
        num_nodes          how many nodes of the allocation that this process is in have servers; -1 for all of them
        num_gpus, tp_size  GPUs of all servers together, and GPUs of each server; without num_gpus there is one server,
                           on a GPU if there is one, else on the CPU
        port               the port of the first server; None for any free port
        max_batch_size     the most prompts that one server, or one request, has at a time
        max_batch_wait_ms  the longest time that a prompt waits for others while a server could take it
        model              the model to load: a folder, a hub name, or "shipped" for the model of this package
        device             "auto", "cpu" or "cuda"
        environment        the servers' environment: variables, and setup lines for bash such as module loads
        health_s           seconds between two health checks of a server; after three failed checks in a row the server
                           is ended
        """
        self.name = name
        self._arguments: dict[str, Any] = {
            "config_file": None if config_file is None else os.path.abspath(os.path.expanduser(config_file)),
            "model_name": model_name,
            "tp_size": tp_size,
            "model": model,
            "device": device,
            "health_s": health_s,
            "environment": msgspec.to_builtins(read_environment(environment)),
        }
        self._nodes: ServerNodes | None = None
        self.api_key = secrets.token_urlsafe(32)
        self._file = None if config_file is None else Path(os.path.expanduser(config_file)).absolute()
        self._overrides: dict[str, dict[str, Any]] = {
            "required": {"model_name": model_name, "tp_size": tp_size},
            "hardware": {"num_nodes": num_nodes, "num_gpus": num_gpus},
            "server": {"model": model, "device": device},
        }
        self._port = port
        self._max_batch_size, self._max_batch_wait_ms = max_batch_size, max_batch_wait_ms
        self._health_s = health_s
        self.environment = read_environment(environment)
        self._lock = asyncio.Lock()
        self._starting: asyncio.Task[None] | None = None
        self._began: float | None = None
        self._folder: RunDir | None = None
        self._plan: Plan | None = None
        self._servers: list[VllmServer] = []
        self._watches: list[asyncio.Task[None]] = []
        self._problems: dict[str, str] = {}
        self._runner: PromptRunner | None = None
        self._end_reason = ""
        self._unused_keys: list[str] = []
        self._planned_names: tuple[str, ...] | None = None

    # --- what it is

    @property
    def urls(self) -> list[str]:
        """The base URL of each server's OpenAI API; empty before the start."""
        return [server.url for server in (*self._servers, *self._remote_servers)]

    def get_endpoint(self) -> str | None:
        """The address of the first server, as in `http://127.0.0.1:8000`; None before the start."""
        return self.urls[0].removesuffix("/v1") if self.urls else None

    @property
    def progress(self) -> str:
        """The progress of the start, or the state of the servers, in words."""
        if self._closing is not None:
            return "closed"
        if self._runner is not None:
            if self._all_dead:
                return "ended; the next prompt starts it anew"
            return "; ".join(["ready", *self._problems.values()])
        if self._began is None:
            return "not started"
        stage = self._servers[0].stage if self._servers else "looking at model and hardware"
        return f"starting vLLM: {stage}, {time.monotonic() - self._began:.0f} s"

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"backend": self.name, "progress": self.progress}
        if self._plan is not None:
            described |= {
                "model": self._plan.model.names[0],
                "models": list(self._plan.model.names),
                "source": self._plan.model.source,
                "device": self._plan.device,
                "replicas": len(self._servers) + len(self._remote_servers),
                "urls": self.urls,
                "logs": [str(launch.log) for launch in self._plan.launches],
            }
        if self._unused_keys:
            described["settings that nothing here needs"] = self._unused_keys
        return described

    def check(self, spec: TaskSpec) -> None:
        check_prompts(spec)
        model, served = spec.work.model if isinstance(spec.work, Completion) else None, self._served_names()
        if isinstance(model, str) and served and model not in served:
            raise InvalidTask(str(UnknownName("model", model, served)))

    def _served_names(self) -> tuple[str, ...]:
        """The model names that tasks may use, from the servers, or before their start from the settings; empty where
        unknown."""
        if self._servers and self._servers[0].models:
            return self._servers[0].models
        if self._planned_names is None:
            try:
                config = read_config(self._file, self._overrides)
                adapters = any("lora" in argument for argument in config.server.extra_args)  # each has a name
                self._planned_names = () if adapters else find_model(config, self._model_folders).names
            except InvalidSettings:
                self._planned_names = ()
        return self._planned_names

    @property
    def _model_folders(self) -> list[Path]:
        """The folders that a relative path to a model may start from."""
        return [Path.cwd(), *([self._file.parent] if self._file else [])]

    @property
    def serves_shipped_model(self) -> bool:
        """Whether the servers serve the model of this package under that model's own name."""
        return MODEL_NAME in self._served_names()

    # --- its life

    @property
    def _all_dead(self) -> bool:
        return all(server.is_dead for server in self._servers) and not self._remote_servers

    @property
    def _remote_servers(self) -> list[RemoteServer]:
        return list(self._nodes.servers.values()) if self._nodes is not None else []

    def living_ports(self) -> set[int]:
        """The ports of the servers of this node that are not dead."""
        return {server.launch.port for server in self._servers if not server.is_dead}

    async def start(self) -> None:
        async with self._lock:
            if self._closing is not None:
                raise BackendUnavailable(f"backend {self.name!r} is closed; make a new one.")
            if self._runner is not None and not self._all_dead:
                return
            self._starting = asyncio.create_task(self._start())
            try:
                await self._starting
            except asyncio.CancelledError:
                if self._closing is not None:
                    raise BackendUnavailable(f"backend {self.name!r} was closed while it started.") from None
                raise
            finally:
                self._starting = self._began = None

    async def _start(self) -> None:
        self._began, self._planned_names, self._end_reason = time.monotonic(), None, ""
        await self._end_servers()
        config = read_config(self._file, self._overrides)
        limits = self._limits(config)
        hosts = other_hosts(config.hardware.num_nodes)
        config = with_share(config, 1 + len(hosts))
        plan = await self._make_plan(config)
        self._servers = [self._server(launch) for launch in plan.launches]
        self._plan, self._unused_keys = plan, config.unused
        starts = [server.start(config.server.start_timeout_s) for server in self._servers]
        if hosts:
            self._nodes = await self._server_nodes(hosts, config)
            starts.append(self._nodes.start(config.server.start_timeout_s))
        try:
            await _run_all(starts)
        except BaseException as error:
            await _run_uncancelled(self._stop_servers())
            self._plan = None
            if isinstance(error, RequestRefused | ServerLost):
                raise BackendUnavailable(f"the vLLM server does not answer: {error}") from error
            raise
        llm = config.llm
        note = SHIPPED_NOTE if plan.model.source == str(MODEL_DIR.resolve()) else ""
        defaults = Defaults(plan.model.names[0], llm.request_parameters, llm.system_text, SCHEMA_OPTIONS, note)
        self._runner = PromptRunner([*self._servers, *self._remote_servers], defaults, limits)
        self._watches = [
            asyncio.create_task(self._restart_when_dead(index, self._runner, config.server.start_timeout_s))
            for index in range(len(self._servers))
        ]

    async def _server_nodes(self, hosts: Sequence[str], config: VllmConfig) -> ServerNodes:
        assert self._folder is not None, "the plan has made it"
        return ServerNodes(
            hosts,
            {**self._arguments, "num_nodes": 1, "num_gpus": config.hardware.num_gpus},
            self.api_key,
            await self.environment.build(_HUB_TOKENS),
            folder=self._folder.path,
            book=self.book,
            on_ready=self._add_remote,
            on_lost=self._lose_remote,
        )

    def _add_remote(self, server: RemoteServer) -> None:
        self._problems.pop(server.url, None)
        if self._runner is not None:
            self._runner.add_server(server)

    def _lose_remote(self, server: RemoteServer, reason: str) -> None:
        if self._runner is not None:
            if self._all_dead:
                self._end_reason = reason
            self.on_loss(reason)
            self._problems[server.url] = reason
            self._runner.remove_server(server, reason)

    async def _stop_servers(self) -> None:
        nodes, self._nodes = self._nodes, None
        if nodes is not None:
            await nodes.stop()
        await _stop_all(self._servers)
        self._servers = []

    def _server(self, launch: Launch) -> VllmServer:
        return VllmServer(launch, book=self.book, health_s=self._health_s)

    async def _restart_when_dead(self, index: int, runner: PromptRunner, timeout_s: float) -> None:
        """Restart the server at this index when it dies, until no server is left or RESTARTS restarts have failed."""
        failures = 0
        while True:
            server = self._servers[index]
            reason = await server.until_dead()
            if self._all_dead:
                self._end_reason = reason
            self.on_loss(reason)
            runner.remove_server(server, reason)
            _log.warning("backend %r: %s", self.name, reason)
            await server.stop()
            failures = 0 if server.has_answered else failures
            while server is self._servers[index]:
                which = f"its server on port {server.launch.port}"
                if self._all_dead or failures == RESTARTS:
                    self._problems[which] = f"{which} is gone after {failures} tries to start it again: {reason}"
                    return
                failures += 1
                self._problems[which] = f"{which} is started again ({failures} of {RESTARTS}) after: {reason}"
                await asyncio.sleep(restart_delay_s(failures))
                reason = await self._replace(index, timeout_s) or reason
            self._problems.pop(which, None)
            runner.add_server(self._servers[index])

    async def _replace(self, index: int, timeout_s: float) -> str:
        """Start a server in place of a dead one. Returns the reason of a failure, an empty text on success."""
        server = self._server(self._servers[index].launch)
        try:
            await server.start(timeout_s)
        except BaseException as error:
            await _run_uncancelled(server.stop())
            if isinstance(error, RhapsodyError | RequestRefused | ServerLost):
                return str(error)
            raise
        self._servers[index] = server
        return ""

    async def _make_plan(self, config: VllmConfig) -> Plan:
        model = find_model(config, self._model_folders)
        hardware = await detect_hardware(config)
        if self._folder is None:
            self._folder = RunDir()
        return plan_servers(
            config,
            model,
            hardware,
            port=self._port,
            api_key=self.api_key,
            folder=self._folder.path,
            environment=await self.environment.build(_HUB_TOKENS),
        )

    def _limits(self, config: VllmConfig) -> Limits:
        """The limits of the constructor; where one has its default value, the limit of the config file."""
        batching = config.input_batching
        at_once, wait_s = self._max_batch_size, self._max_batch_wait_ms / 1000
        if at_once == _MAX_BATCH_SIZE and batching.max_batch_limit is not None:
            at_once = batching.max_batch_limit
        if self._max_batch_wait_ms == _MAX_BATCH_WAIT_MS and batching.input_batch_wait_seconds is not None:
            wait_s = batching.input_batch_wait_seconds
        return read_limits(at_once, wait_s, batches=batching.toggle_on, our_own=True)

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        if self._runner is None or self._all_dead:
            raise BackendUnavailable(self._end_reason or f"no server of backend {self.name!r} is running.")
        self._runner.submit(task_runs, report, read)

    def cancel(self, uids: Collection[str]) -> None:
        if self._runner is not None:
            self._runner.cancel(uids)

    def prioritize(self, priorities: Mapping[str, int]) -> None:
        if self._runner is not None:
            self._runner.prioritize(priorities)

    async def rest(self) -> None:
        async with self._lock:
            await self._end_servers()

    async def _end_servers(self) -> None:
        """End every server, and every prompt on them."""
        for watch in self._watches:
            watch.cancel()
        if self._watches:
            await asyncio.wait(self._watches)
        if self._runner is not None:
            await self._runner.close()
        self._runner = None
        await self._stop_servers()
        self._watches, self._problems = [], {}

    async def _close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        await self._end_servers()
        if self._folder is not None:
            self._folder.remove()


async def _run_all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run these coroutines concurrently; where one fails, cancel the others, and raise once all have ended."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _stop_all(servers: Iterable[VllmServer]) -> None:
    stops = [asyncio.create_task(server.stop()) for server in servers]
    if stops:
        await asyncio.wait(stops)
    for stop in stops:
        stop.result()


async def _run_uncancelled(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run the coroutine to its end; a cancellation of the caller takes effect afterwards."""
    task = asyncio.create_task(coroutine)
    canceled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            canceled = True
    task.result()
    if canceled:
        raise asyncio.CancelledError
