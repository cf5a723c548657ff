"""Plans and makes the backends of a session, without starting them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from rhapsody_mcp.backends import BACKENDS, Registration
from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.backends.compute.backend import ComputeBackend
from rhapsody_mcp.backends.environment import Environment
from rhapsody_mcp.backends.pilot.allocation import Allocation
from rhapsody_mcp.backends.pilot.backend import PilotBackend
from rhapsody_mcp.backends.pilot.messages import PlannedBackend
from rhapsody_mcp.backends.vllm.config import SHIPPED, Device, VllmConfig, read_config
from rhapsody_mcp.backends.vllm.launch_plan import find_model, interpreter
from rhapsody_mcp.engine.software.containers import find_container
from rhapsody_mcp.engine.software.interpreter import find_interpreter
from rhapsody_mcp.machine import Machine, inspect_machine
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidRequest, InvalidSettings
from rhapsody_mcp.model.specs import Caps, Software
from rhapsody_mcp.runtime.allocation_plan import DEFAULT_MINUTES, AllocationPlan
from rhapsody_mcp.runtime.policy import Policy
from rhapsody_mcp.schedulers.allocation import current_allocation
from rhapsody_mcp.schedulers.detection import scheduler_here
from rhapsody_mcp.schedulers.options import SchedulerOptions
from rhapsody_mcp.settings import Settings

__all__ = [
    "BackendName",
    "BackendPlan",
    "OpenBackends",
    "SessionConfig",
    "open_backends",
    "plan_backends",
    "try_environment",
]

if TYPE_CHECKING:
    BackendName = str
else:
    BackendName = Literal[tuple(BACKENDS)]


class SessionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of `create_session`. Without `backends`, the session gets the default backends of this machine.

    The ledger stores a config as JSON: a renamed field makes stored sessions unreadable.
    """

    backends: tuple[BackendName, ...] = ()
    num_workers: int | None = None
    model: str | None = None
    device: Device | None = None
    config_file: str | None = None
    endpoint_url: str | None = None
    endpoint_model: str | None = None
    environment: Environment | None = None
    nodes: int | None = None
    minutes: int | None = None
    scheduler: SchedulerOptions | None = None
    folder: str = ""
    """The working directory of the tasks; empty for the working directory of this process."""
    software: Software = Software()

    @property
    def needs_allocation(self) -> bool:
        """Whether the scheduler is asked for the nodes; the nodes of a job that this process is in are used as they
        are."""
        return self.nodes is not None and current_allocation(os.environ) is None


OpenBackends = Callable[[SessionConfig], Sequence[Backend]]
_IN_SERVICE = ("endpoint",)
"""The backends that stay in the service where the others run in an allocation."""


class BackendPlan(msgspec.Struct, frozen=True):
    """The name of a backend, and the arguments of its class.

    `server_arguments` come from the settings of the server; an exported script does not repeat them.
    """

    name: BackendName
    arguments: dict[str, Any]
    server_arguments: dict[str, Any] = {}

    def open(self) -> Backend:
        backend: Backend = BACKENDS[self.name].load_class()(**{**self.arguments, **self.server_arguments})
        return backend

    def open_for_checks(self, nodes: int) -> Backend:
        """A backend that checks tasks for so many nodes of an allocation, and is never started."""
        elsewhere = ("num_nodes", "num_workers")  # this machine may have less
        here = {name: None if name in elsewhere else value for name, value in self.arguments.items()}
        backend = replace(self, arguments=here).open()
        if isinstance(backend, ComputeBackend):
            backend.plan_nodes(nodes)
        return backend


def open_backends(config: SessionConfig, settings: Settings) -> list[Backend]:
    """The backends of a new session, not started. Raises what `plan_backends` raises."""
    plans, nodes = plan_backends(config, settings), config.nodes if config.needs_allocation else None
    opened = [plan.open() if nodes is None else plan.open_for_checks(nodes) for plan in plans]
    for backend in opened:
        backend.work_in(config.folder)
    if nodes is None:
        return opened
    options = config.scheduler or SchedulerOptions()
    plan_of_nodes = AllocationPlan(nodes, config.minutes or DEFAULT_MINUTES, options)
    planned = [
        PlannedBackend(plan.name, {**plan.arguments, **plan.server_arguments}, config.folder or os.getcwd())
        for plan in plans
        if plan.name not in _IN_SERVICE
    ]
    python = options.python or sys.executable
    allocation = Allocation(
        plan_of_nodes.request,
        plan_of_nodes.open_scheduler(),
        planned,
        setup=options.setup,
        python=python,
        allocations=options.allocations,
        orphan_s=settings.pilot_idle_s,
    )
    return [
        backend if plan.name in _IN_SERVICE else PilotBackend(backend, allocation)
        for plan, backend in zip(plans, opened, strict=True)
    ]


def plan_backends(config: SessionConfig, settings: Settings) -> list[BackendPlan]:
    """The plans of a session's backends. The settings fill in what the config leaves open.

    Raises InvalidRequest where fields are wrong or contradict each other, InvalidSettings where a model or device
    cannot be used here, and BackendUnavailable where a package is missing.
    """
    machine = inspect_machine()
    names = config.backends or _default_backends(config, machine)
    if len(set(names)) < len(names):
        raise InvalidRequest(f"backends is {list(names)}; name each backend once.", field="backends")
    _refuse_unused_fields(config, names)
    _refuse_dragon_without_slurm(config, names)
    _check_policy(config, Policy.of(settings))
    arguments = {name: _backend_arguments(name, config, settings, machine) for name in names}
    return [BackendPlan(name, arguments[name], _server_arguments(name, config, settings)) for name in names]


async def try_environment(config: SessionConfig, settings: Settings) -> None:
    """Raise InvalidRequest for setup lines that fail, a Python that is none and a container that cannot be, where tasks
    run on this machine."""
    if config.needs_allocation:
        return
    if config.environment is not None and config.environment.setup:
        Policy.of(settings).check_setup()
        await _try_setup(replace(config.environment, withheld=settings.withheld_variables))
    software, folder = config.software, config.folder or os.getcwd()
    if software.container:
        has_setup = bool(config.environment and config.environment.setup) or bool(software.setup)
        await asyncio.to_thread(
            find_container, software.container, folder, runtime=software.runtime, after_setup=has_setup
        )
    elif software.python:
        await asyncio.to_thread(find_interpreter, software.python, folder)


async def _try_setup(environment: Environment) -> None:
    """Raise InvalidSettings where its setup lines fail. A trial that a client gives up goes on: `module load` may take
    longer than a client waits, and the next call for the same environment gets the end of the trial."""
    loop, key = asyncio.get_running_loop(), msgspec.json.encode(environment)
    trial = _trials.get(key)
    if trial is None or trial.get_loop() is not loop:
        trial = _trials[key] = loop.create_task(environment.build())
        trial.add_done_callback(lambda trial: loop.call_later(_TRIAL_KEPT_S, _forget_trial, key, trial))
    await asyncio.wait([trial])
    _forget_trial(key, trial)
    trial.result()


def _forget_trial(key: bytes, trial: asyncio.Task[dict[str, str]]) -> None:
    if not trial.cancelled():
        trial.exception()  # perhaps nobody has come for it
    if _trials.get(key) is trial:
        del _trials[key]


_TRIAL_KEPT_S = 120.0
"""How long the end of a trial is kept whose call was given up; later, the lines may do something else."""
_trials: dict[bytes, asyncio.Task[dict[str, str]]] = {}
"""The trials of setup lines that run, or whose end nobody has taken."""


def _check_policy(config: SessionConfig, policy: Policy) -> None:
    if config.environment is not None and config.environment.setup:
        policy.check_setup()
    if config.config_file is not None:
        policy.check_folder("config_file", os.path.expanduser(config.config_file))
    if policy.executables is None and policy.folders is None:
        return
    if config.config_file is None and config.model is None:
        return
    vllm_config, folders = _vllm_config(config.config_file, config.model)
    if vllm_config.server.python is not None:
        policy.check_executable("python in the section server of config_file", interpreter(vllm_config))
    model = vllm_config.server.model or vllm_config.required.model_name
    if model is not None and model != SHIPPED and os.path.isabs(source := find_model(vllm_config, folders).source):
        policy.check_folder("model", source)


def _server_arguments(name: BackendName, config: SessionConfig, settings: Settings) -> dict[str, Any]:
    environment = replace(config.environment or Environment(), withheld=settings.withheld_variables)
    caps = Caps(settings.max_result_bytes, settings.max_output_bytes, exception_bytes=0)
    arguments = {"environment": environment, "caps": caps, "stall_s": settings.stall_s}
    arguments["health_s"] = settings.vllm_health_s
    return {argument: arguments[argument] for argument in BACKENDS[name].server_arguments}


def _default_backends(config: SessionConfig, machine: Machine) -> tuple[BackendName, ...]:
    compute: BackendName = "dragon" if machine.dragon.present and not _spans_nodes_without_slurm(config) else "local"
    if config.endpoint_url:
        return (compute, "endpoint")
    if config.model or config.device or config.config_file or machine.vllm.present:
        return (compute, "vllm")
    return (compute,)


def _spans_nodes_without_slurm(config: SessionConfig) -> bool:
    """Whether the session asks for several nodes of hosts, or of another scheduler than Slurm."""
    if (config.nodes or 1) == 1:
        return False
    if (own := current_allocation(os.environ)) is not None:
        return own.scheduler != "slurm"
    options = config.scheduler or SchedulerOptions()
    return bool(options.hosts) or scheduler_here().name != "slurm"


def _refuse_dragon_without_slurm(config: SessionConfig, names: Sequence[BackendName]) -> None:
    if "dragon" in names and _spans_nodes_without_slurm(config):
        raise InvalidRequest(
            "backends has dragon, which runs over several nodes in jobs of Slurm alone: give the local backend, as in "
            'backends=["local"], or nodes=1.',
            field="backends",
        )


def _refuse_unused_fields(config: SessionConfig, names: Sequence[BackendName]) -> None:
    """Raise InvalidRequest for a field that no backend of the session uses."""
    for field in SessionConfig.__struct_fields__:
        users = [name for name, registration in BACKENDS.items() if field in registration.options]
        if users and getattr(config, field) is not None and not set(users) & set(names):
            raise InvalidRequest(
                f"{field} has no effect without the backend {' or '.join(users)}: add it to backends, "
                f"which is {list(names)}, or leave {field} out.",
                field=field,
            )


def _backend_arguments(
    name: BackendName, config: SessionConfig, settings: Settings, machine: Machine
) -> dict[str, Any]:
    num_workers = config.num_workers or settings.default_num_workers
    environment = None if config.environment is None else msgspec.json.decode(msgspec.json.encode(config.environment))
    registration = BACKENDS[name]
    _check_dependency(registration, machine)
    defaults = {"num_workers": num_workers, "environment": environment}
    nodes = {} if config.nodes is None else {"num_nodes": config.nodes}
    match name:
        case "vllm":
            model = config.model or (None if config.config_file else settings.default_model)
            _check_model(config.config_file, model)
            if config.nodes is None:
                _check_device(config, machine)
            arguments = {"config_file": config.config_file, "model": model, "device": config.device}
            return {**arguments, "environment": environment, **({} if config.config_file else nodes)}
        case "endpoint":
            return _endpoint_arguments(config, settings)
        case _:
            return {option: defaults.get(option, getattr(config, option)) for option in registration.options} | nodes


def _check_model(config_file: str | None, model: str | None) -> None:
    """Raise InvalidSettings for a config file that is wrong, or a model that is not there."""
    find_model(*_vllm_config(config_file, model))


def _check_device(config: SessionConfig, machine: Machine) -> None:
    vllm_config, _ = _vllm_config(config.config_file, None)
    if "cuda" in (config.device, vllm_config.server.device if config.device is None else None) and not machine.gpus:
        raise InvalidSettings(
            'device is "cuda", and this machine has no GPU. Leave device out, or give "cpu", to serve the model on the '
            "CPU; a server on a machine that has one is reached with the backend endpoint and its endpoint_url.",
            field="device",
        )


def _vllm_config(config_file: str | None, model: str | None) -> tuple[VllmConfig, list[Path]]:
    """The settings of the vllm backend, and the folders in which a relative path to a model is looked for."""
    path = Path(os.path.expanduser(config_file)).absolute() if config_file else None
    config = read_config(path, {"server": {"model": model}})
    return config, [Path.cwd(), *([path.parent] if path else [])]


def _endpoint_arguments(config: SessionConfig, settings: Settings) -> dict[str, Any]:
    if (url := config.endpoint_url or settings.endpoint_url) is None:
        raise InvalidRequest('the endpoint backend needs endpoint_url, as in "http://127.0.0.1:8000/v1".')
    if not _is_http_url(url):
        raise InvalidRequest(
            f'endpoint_url is {url!r}; valid is the address of an HTTP server, as in "http://127.0.0.1:8000/v1".',
            field="endpoint_url",
        )
    is_from_settings = url == settings.endpoint_url  # the API key is sent to no other address
    model = config.endpoint_model or (settings.endpoint_model if is_from_settings else None)
    return {"url": url, "model": model, "api_key": settings.endpoint_api_key if is_from_settings else None}


def _is_http_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an invalid port, or a bracket that is not closed
        return False


def _check_dependency(registration: Registration, machine: Machine) -> None:
    dependency = machine.dependency(registration.needs)
    if dependency is not None and not dependency.present:
        raise BackendUnavailable(
            f"{dependency.name} is not installed here. Get it with: {dependency.remedy}; or {registration.alternative}."
        )
