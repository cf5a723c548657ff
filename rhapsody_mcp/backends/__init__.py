"""Backends, opened by name: only the one that is asked for is imported.

Importing this package makes `multiprocessing.set_start_method("dragon")` work in a plain Python process, where it
means spawn; under Dragon its own start method stays.
"""

from __future__ import annotations

import multiprocessing.context
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from rhapsody_mcp.backends.dragon import DragonExecutionBackendV3
    from rhapsody_mcp.backends.endpoint import EndpointInferenceBackend
    from rhapsody_mcp.backends.local import LocalExecutionBackend
    from rhapsody_mcp.backends.vllm.backend import DragonVllmInferenceBackend

__all__ = [
    "BACKENDS",
    "DragonExecutionBackendV3",
    "DragonVllmInferenceBackend",
    "EndpointInferenceBackend",
    "LocalExecutionBackend",
    "Registration",
]

_COMPUTE = "functions and executables, as workers, single processes and jobs of many ranks"


class Registration(NamedTuple):
    """A kind of backend. A new one is an entry in `BACKENDS`, and a class that keeps the contract of
    `backends.base.Backend`."""

    module: str
    class_name: str
    runs: str
    """What an agent is told that it runs; `{device}` stands for what a model is served on."""
    options: tuple[str, ...] = ()
    """The options of create_session that it takes. They are arguments of its class, unless `runtime.backend_factory`
    has rules of its own for the backend."""
    server_arguments: tuple[str, ...] = ()
    """Arguments of its class that the server's settings decide: of environment, caps, stall_s, health_s."""
    needs: Literal["", "dragon", "vllm"] = ""
    """The program that it needs on this machine, as `machine.Machine` names it."""
    alternative: str = ""
    """What else serves where that program is missing."""
    paths: tuple[str, ...] = ()
    """Arguments that may be paths on this machine."""

    def load_class(self) -> Any:
        return getattr(import_module(self.module), self.class_name)


_COMPUTE_OPTIONS = ("num_workers", "environment")
_COMPUTE_ARGUMENTS = ("environment", "caps", "stall_s")
BACKENDS = {
    "dragon": Registration(
        "rhapsody_mcp.backends.dragon",
        "DragonExecutionBackendV3",
        f"{_COMPUTE}, placed by Dragon",
        _COMPUTE_OPTIONS,
        _COMPUTE_ARGUMENTS,
        needs="dragon",
        alternative="the local backend runs the same tasks with processes of this machine",
    ),
    "local": Registration(
        "rhapsody_mcp.backends.local",
        "LocalExecutionBackend",
        f"{_COMPUTE}, as processes of this machine; no Dragon needed",
        _COMPUTE_OPTIONS,
        _COMPUTE_ARGUMENTS,
    ),
    "vllm": Registration(
        "rhapsody_mcp.backends.vllm.backend",
        "DragonVllmInferenceBackend",
        "prompts, with a vLLM server that the session starts on {device}",
        ("model", "device", "config_file", "environment"),
        ("environment", "health_s"),
        needs="vllm",
        alternative="the endpoint backend speaks to a server that runs elsewhere",
        paths=("config_file", "model"),
    ),
    "endpoint": Registration(
        "rhapsody_mcp.backends.endpoint",
        "EndpointInferenceBackend",
        "prompts, with an OpenAI-compatible server at endpoint_url",
        ("endpoint_url", "endpoint_model"),
    ),
}
"""Every kind of backend, by the name that sessions know it by."""


class _DragonContext(multiprocessing.context.SpawnContext):
    """Plain spawn under the name that programs for Dragon ask for: tasks run in the backend's own Dragon."""

    _name = "dragon"


_contexts: dict[str, multiprocessing.context.BaseContext] = vars(multiprocessing.context)["_concrete_contexts"]
_contexts.setdefault("dragon", _DragonContext())


def __getattr__(name: str) -> Any:
    for registration in BACKENDS.values():
        if registration.class_name == name:
            return registration.load_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
