"""Runs prompts on vLLM servers that it starts."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rhapsody_mcp.backends.base import RESTARTS, BackendBase, Kind, Report, restart_delay_s
from rhapsody_mcp.backends.environment import read_environment
from rhapsody_mcp.backends.inference.batching import Limits, read_limits
from rhapsody_mcp.backends.inference.openai_client import Lost, Refused
from rhapsody_mcp.backends.inference.prompt_runner import Defaults, PromptRunner, check_prompts
from rhapsody_mcp.backends.local_models import SHIPPED_NOTE
from rhapsody_mcp.backends.vllm.config import Device, VllmConfig, read_config
from rhapsody_mcp.backends.vllm.launch_plan import SCHEMA_OPTIONS, Plan, find_model, look_at_hardware, plan_servers
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
"""What a server needs to download a model: it keeps them where tasks do not have them."""

_log = logging.getLogger(__name__)


class DragonVllmInferenceBackend(BackendBase):
    """Starts one stock vLLM server for each `tp_size` of `num_gpus`, and shares prompts out among them.

    Server i listens on `port` + i of 127.0.0.1; `urls` are their OpenAI APIs, for any client that has `api_key`.
    Each is a process of this node that sees its own GPUs and no others (CUDA_VISIBLE_DEVICES); on the CPU, each
    uses all cores. A server that dies, or that hangs, fails the tasks that it was working on and is started again 1, 2,
    4, 8 and 16 s later, while others serve; when none is left, `start` starts them all anew.
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
        """What is given here wins over `config_file`, which is read when the backend starts.

        config_file        YAML that describes model and hardware; `rhapsody-mcp init` writes one
        model_name         the name that tasks use, and the model itself where nothing else names it
        num_nodes          1: a backend serves on its own node
        num_gpus, tp_size  GPUs in all, and GPUs for one server; without num_gpus, one server on a GPU if there is
                           one, else on the CPU
        port               of the first server; None for any that is free
        max_batch_size     the most prompts that one server has at a time, and that one request holds
        max_batch_wait_ms  the longest that a prompt waits for others while the server could take it
        model              what to load: a folder, a hub name, or "shipped" for the model of this package
        device             "auto", "cpu" or "cuda"
        environment        of the servers: variables, and setup lines for bash such as module loads
        health_s           between two looks at whether a server still works; three bad ones in a row end it
        """
        self.name = name
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
        self._unused: list[str] = []
        self._names: tuple[str, ...] | None = None

    # --- what it is

    @property
    def urls(self) -> list[str]:
        """The OpenAI API of each server; empty before the start."""
        return [server.url for server in self._servers]

    def get_endpoint(self) -> str | None:
        """The address of the first server, as in `http://127.0.0.1:8000`; None before the start."""
        return self.urls[0].removesuffix("/v1") if self.urls else None

    @property
    def progress(self) -> str:
        """How far the start is, in words."""
        if self._closing is not None:
            return "closed"
        if self._runner is not None:
            if self._is_dead:
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
                "replicas": len(self._plan.launches),
                "urls": self.urls,
                "logs": [str(launch.log) for launch in self._plan.launches],
            }
        if self._unused:
            described["settings that nothing here needs"] = self._unused
        return described

    def check(self, spec: TaskSpec) -> None:
        check_prompts(spec)
        model, served = spec.work.model if isinstance(spec.work, Completion) else None, self._served()
        if isinstance(model, str) and served and model not in served:
            raise InvalidTask(str(UnknownName("model", model, served)))

    def _served(self) -> tuple[str, ...]:
        """The names that a task may use, as the servers say, or before that the settings; empty where neither knows."""
        if self._servers and self._servers[0].models:
            return self._servers[0].models
        if self._names is None:
            try:
                config = read_config(self._file, self._overrides)
                adapters = any("lora" in argument for argument in config.server.extra_args)  # each has a name
                self._names = () if adapters else find_model(config, self._folders).names
            except InvalidSettings:
                self._names = ()
        return self._names

    @property
    def _folders(self) -> list[Path]:
        """Where a relative path to a model begins."""
        return [Path.cwd(), *([self._file.parent] if self._file else [])]

    @property
    def serves_shipped_model(self) -> bool:
        """Whether it serves the model of this package under its own name."""
        return MODEL_NAME in self._served()

    # --- its life

    @property
    def _is_dead(self) -> bool:
        return all(server.is_dead for server in self._servers)

    async def start(self) -> None:
        async with self._lock:
            if self._closing is not None:
                raise BackendUnavailable(f"backend {self.name!r} is closed; make a new one.")
            if self._runner is not None and not self._is_dead:
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
        self._began, self._names, self._end_reason = time.monotonic(), None, ""
        await self._end_servers()
        config = read_config(self._file, self._overrides)
        limits = self._limits(config)
        plan = await self._make_plan(config)
        self._servers = [self._server(launch) for launch in plan.launches]
        self._plan, self._unused = plan, config.unused
        try:
            await _together(server.start(config.server.start_timeout_s) for server in self._servers)
        except BaseException as error:
            await _to_its_end(_stop(self._servers))
            self._servers, self._plan = [], None
            if isinstance(error, Refused | Lost):
                raise BackendUnavailable(f"the vLLM server does not answer: {error}") from error
            raise
        llm = config.llm
        note = SHIPPED_NOTE if plan.model.source == str(MODEL_DIR.resolve()) else ""
        defaults = Defaults(plan.model.names[0], llm.request_parameters, llm.system_text, SCHEMA_OPTIONS, note)
        self._runner = PromptRunner(self._servers, defaults, limits)
        self._watches = [
            asyncio.create_task(self._keep_up(index, self._runner, config.server.start_timeout_s))
            for index in range(len(self._servers))
        ]

    def _server(self, launch: Launch) -> VllmServer:
        return VllmServer(launch, book=self.book, health_s=self._health_s)

    async def _keep_up(self, index: int, runner: PromptRunner, timeout_s: float) -> None:
        """Restart the server at this index when it dies, until no server is left or RESTARTS restarts have failed."""
        failures = 0
        while True:
            server = self._servers[index]
            reason = await server.until_dead()
            if self._is_dead:
                self._end_reason = reason
            self.on_loss(reason)
            runner.lose(server, reason)
            _log.warning("backend %r: %s", self.name, reason)
            await server.stop()
            failures = 0 if server.has_answered else failures
            while server is self._servers[index]:
                which = f"its server on port {server.launch.port}"
                if self._is_dead or failures == RESTARTS:
                    self._problems[which] = f"{which} is gone after {failures} tries to start it again: {reason}"
                    return
                failures += 1
                self._problems[which] = f"{which} is started again ({failures} of {RESTARTS}) after: {reason}"
                await asyncio.sleep(restart_delay_s(failures))
                reason = await self._replace(index, timeout_s) or reason
            self._problems.pop(which, None)
            runner.gain(self._servers[index])

    async def _replace(self, index: int, timeout_s: float) -> str:
        """Start another server for one that is dead; why that failed, empty where it serves."""
        server = self._server(self._servers[index].launch)
        try:
            await server.start(timeout_s)
        except BaseException as error:
            await _to_its_end(server.stop())
            if isinstance(error, RhapsodyError | Refused | Lost):
                return str(error)
            raise
        self._servers[index] = server
        return ""

    async def _make_plan(self, config: VllmConfig) -> Plan:
        model = find_model(config, self._folders)
        hardware = await look_at_hardware(config)
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
        """The constructor's bounds where they are not its defaults, else the file's."""
        batching = config.input_batching
        at_once, wait_s = self._max_batch_size, self._max_batch_wait_ms / 1000
        if at_once == _MAX_BATCH_SIZE and batching.max_batch_limit is not None:
            at_once = batching.max_batch_limit
        if self._max_batch_wait_ms == _MAX_BATCH_WAIT_MS and batching.input_batch_wait_seconds is not None:
            wait_s = batching.input_batch_wait_seconds
        return read_limits(at_once, wait_s, batches=batching.toggle_on, our_own=True)

    def submit(self, task_runs: Sequence[TaskRun], report: Report, read: Reader) -> None:
        if self._runner is None or self._is_dead:
            raise BackendUnavailable(self._end_reason or f"no server of backend {self.name!r} is running.")
        self._runner.submit(task_runs, report, read)

    def cancel(self, uids: Collection[str]) -> None:
        if self._runner is not None:
            self._runner.cancel(uids)

    async def rest(self) -> None:
        async with self._lock:
            await self._end_servers()

    async def _end_servers(self) -> None:
        """End every server, and what they were asked."""
        for watch in self._watches:
            watch.cancel()
        if self._watches:
            await asyncio.wait(self._watches)
        if self._runner is not None:
            await self._runner.close()
        await _stop(self._servers)
        self._runner, self._servers, self._watches, self._problems = None, [], [], {}

    async def _close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait({self._starting})
        await self._end_servers()
        if self._folder is not None:
            self._folder.remove()


async def _together(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run these at the same time; where one fails, cancel the others, and raise when all have ended."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


async def _stop(servers: Iterable[VllmServer]) -> None:
    stops = [asyncio.create_task(server.stop()) for server in servers]
    if stops:
        await asyncio.wait(stops)
    for stop in stops:
        stop.result()


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Run this to its end, also while the caller is being cancelled; the caller is cancelled afterwards."""
    task = asyncio.create_task(work)
    canceled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            canceled = True
    task.result()
    if canceled:
        raise asyncio.CancelledError
