"""Works out and makes the backends that a session asks for; none of them is started here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from rhapsody_mcp.backends import BACKENDS, Registration
from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.backends.environment import Environment
from rhapsody_mcp.backends.vllm.config import SHIPPED, Device, VllmConfig, read_config
from rhapsody_mcp.backends.vllm.launch_plan import find_model, interpreter
from rhapsody_mcp.machine import Machine, look
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidRequest, InvalidSettings
from rhapsody_mcp.model.specs import Caps
from rhapsody_mcp.runtime.policy import Policy
from rhapsody_mcp.settings import Settings

__all__ = ["BackendName", "OpenBackends", "Plan", "Wanted", "open_backends", "plan_backends"]

if TYPE_CHECKING:
    BackendName = str
else:
    BackendName = Literal[tuple(BACKENDS)]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a session shall have. Without `backends`: what runs functions here, and what answers prompts here."""

    backends: tuple[BackendName, ...] = ()
    num_workers: int | None = None
    model: str | None = None
    device: Device | None = None
    config_file: str | None = None
    endpoint_url: str | None = None
    endpoint_model: str | None = None
    environment: Environment | None = None
    folder: str = ""
    """Where its tasks start; empty for the folder of this process."""


OpenBackends = Callable[[Wanted], Sequence[Backend]]


class Plan(msgspec.Struct, frozen=True):
    """A backend before it is made: its name, and the arguments of its class. Those in `of_server` are as the server's
    settings say; who makes it again elsewhere leaves them out."""

    name: BackendName
    arguments: dict[str, Any]
    of_server: dict[str, Any] = {}

    def open(self) -> Backend:
        backend: Backend = BACKENDS[self.name].load_class()(**{**self.arguments, **self.of_server})
        return backend


def open_backends(wanted: Wanted, settings: Settings) -> list[Backend]:
    """The backends of a session on this machine; raises what `plan_backends` raises."""
    opened = [plan.open() for plan in plan_backends(wanted, settings)]
    for backend in opened:
        backend.work_in(wanted.folder)
    return opened


def plan_backends(wanted: Wanted, settings: Settings) -> list[Plan]:
    """What a session gets on this machine; what is not wished for is as the settings say.

    Raises InvalidRequest where a wish is wrong or contradicts another, BackendUnavailable where a program is missing.
    """
    machine = look()
    names = wanted.backends or _defaults(wanted, machine)
    if len(set(names)) < len(names):
        raise InvalidRequest(f"backends is {list(names)}; name each backend once.")
    _refuse_idle_wishes(wanted, names)
    _check_policy(wanted, Policy.of(settings))
    arguments = {name: _arguments(name, wanted, settings, machine) for name in names}
    return [Plan(name, arguments[name], _of_server(name, wanted, settings)) for name in names]


def _check_policy(wanted: Wanted, policy: Policy) -> None:
    if wanted.environment is not None and wanted.environment.setup:
        policy.check_setup()
    if wanted.config_file is not None:
        policy.check_folder("config_file", os.path.expanduser(wanted.config_file))
    if policy.executables is None and policy.folders is None:
        return
    if wanted.config_file is None and wanted.model is None:
        return
    config, folders = _vllm_config(wanted.config_file, wanted.model)
    if config.server.python is not None:
        policy.check_executable("python in the section server of config_file", interpreter(config))
    named = config.server.model or config.required.model_name
    if named is not None and named != SHIPPED and os.path.isabs(source := find_model(config, folders).source):
        policy.check_folder("model", source)


def _of_server(name: BackendName, wanted: Wanted, settings: Settings) -> dict[str, Any]:
    environment = replace(wanted.environment or Environment(), withheld=settings.withheld_variables)
    caps = Caps(settings.max_result_bytes, settings.max_output_bytes, exception_bytes=0)
    arguments = {"environment": environment, "caps": caps, "stall_s": settings.stall_s}
    arguments["health_s"] = settings.vllm_health_s
    return {argument: arguments[argument] for argument in BACKENDS[name].server_arguments}


def _defaults(wanted: Wanted, machine: Machine) -> tuple[BackendName, ...]:
    compute = machine.default_compute
    if wanted.endpoint_url:
        return (compute, "endpoint")
    if wanted.model or wanted.device or wanted.config_file or machine.vllm.present:
        return (compute, "vllm")
    return (compute,)


def _refuse_idle_wishes(wanted: Wanted, names: Sequence[BackendName]) -> None:
    """Refuse a wish that none of the session's backends would hear."""
    for wish in Wanted.__struct_fields__:
        hearers = [name for name, registration in BACKENDS.items() if wish in registration.options]
        if hearers and getattr(wanted, wish) is not None and not set(hearers) & set(names):
            raise InvalidRequest(
                f"{wish} has no effect without the backend {' or '.join(hearers)}: add it to backends, "
                f"which is {list(names)}, or leave {wish} out."
            )


def _arguments(name: BackendName, wanted: Wanted, settings: Settings, machine: Machine) -> dict[str, Any]:
    num_workers = wanted.num_workers or settings.default_num_workers
    environment = None if wanted.environment is None else msgspec.json.decode(msgspec.json.encode(wanted.environment))
    registration = BACKENDS[name]
    _check_program(registration, machine)
    options = {"num_workers": num_workers, "environment": environment}
    match name:
        case "vllm":
            model = wanted.model or (None if wanted.config_file else settings.default_model)
            _refuse_model(wanted.config_file, model)
            _refuse_device(wanted, machine)
            given = {"config_file": wanted.config_file, "model": model, "device": wanted.device}
            return {**given, "environment": environment}
        case "endpoint":
            return _endpoint_arguments(wanted, settings)
        case _:
            return {option: options.get(option, getattr(wanted, option)) for option in registration.options}


def _refuse_model(config_file: str | None, model: str | None) -> None:
    """Raise InvalidSettings where the settings of the vllm backend, or the model that they name, cannot work here."""
    find_model(*_vllm_config(config_file, model))


def _refuse_device(wanted: Wanted, machine: Machine) -> None:
    config, _ = _vllm_config(wanted.config_file, None)
    if "cuda" in (wanted.device, config.server.device if wanted.device is None else None) and not machine.gpus:
        raise InvalidSettings(
            'device is "cuda", and this machine has no GPU. Leave device out, or give "cpu", to serve the model on the '
            "CPU; a server on a machine that has one is reached with the backend endpoint and its endpoint_url."
        )


def _vllm_config(config_file: str | None, model: str | None) -> tuple[VllmConfig, list[Path]]:
    """With the folders in which a relative path to a model may begin."""
    file = Path(os.path.expanduser(config_file)).absolute() if config_file else None
    config = read_config(file, {"server": {"model": model}})
    return config, [Path.cwd(), *([file.parent] if file else [])]


def _endpoint_arguments(wanted: Wanted, settings: Settings) -> dict[str, Any]:
    if (url := wanted.endpoint_url or settings.endpoint_url) is None:
        raise InvalidRequest('the endpoint backend needs endpoint_url, as in "http://127.0.0.1:8000/v1".')
    if not _is_address(url):
        raise InvalidRequest(
            f'endpoint_url is {url!r}; valid is the address of an HTTP server, as in "http://127.0.0.1:8000/v1".'
        )
    own = url == settings.endpoint_url  # the key goes to its own address and to no other
    model = wanted.endpoint_model or (settings.endpoint_model if own else None)
    return {"url": url, "model": model, "api_key": settings.endpoint_api_key if own else None}


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port, or a bracket that is not closed
        return False


def _check_program(registration: Registration, machine: Machine) -> None:
    part = machine.part(registration.needs)
    if part is not None and not part.present:
        raise BackendUnavailable(
            f"{part.name} is not installed here. Get it with: {part.remedy}; or {registration.alternative}."
        )
