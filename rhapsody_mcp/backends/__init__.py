"""The kinds of backend, by name. The module of a backend is imported only when that backend is used.

Importing this package registers the start method "dragon" of `multiprocessing` as another name of spawn, so that
`multiprocessing.set_start_method("dragon")` works in a plain Python process. Under Dragon, Dragon's own method stays.
"""

from __future__ import annotations

import multiprocessing.context
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rhapsody_mcp.model.errors import refuse_import

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
    """Where the class of a backend is, and what the service must know before it imports that class.

    To add a backend, write a class that keeps the contract of `backends.base.Backend`, and add an entry to `BACKENDS`.
    """

    module: str
    class_name: str
    runs: str
    """The kinds of task that the backend runs, in words for agents; `{device}` stands for the device of its model."""
    options: tuple[str, ...] = ()
    """The options of create_session that the backend takes. Each is an argument of the class, unless
    `runtime.backend_factory` has a rule of its own for the backend."""
    server_arguments: tuple[str, ...] = ()
    """The arguments of the class that come from the server's settings: any of environment, caps, stall_s, health_s."""
    needs: Literal["", "dragon", "vllm"] = ""
    """The program that the backend needs on this machine, as `machine.Machine` names it."""
    alternative: str = ""
    """A sentence that names another backend for machines without that program."""
    paths: tuple[str, ...] = ()
    """The arguments whose value may be a path on this machine."""

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
"""Every kind of backend, by the name that sessions use."""

_LOCAL = "LocalExecutionBackend(), which runs functions and programs as processes of this machine"
_DRAGON = "DragonExecutionBackendV3()"

_OF_RHAPSODY_PY = {
    "BackendRegistry": "BACKENDS, which holds every kind by name",
    "BaseBackend": "rhapsody_mcp.backends.base.Backend",
    "ConcurrentExecutionBackend": _LOCAL,
    "DaskExecutionBackend": f"{_LOCAL}, or a session with nodes (docs/allocations.md)",
    "DragonExecutionBackend": _DRAGON,
    "DragonExecutionBackendV1": _DRAGON,
    "DragonExecutionBackendV2": _DRAGON,
    "NoopExecutionBackend": "rhapsody_mcp.testing.ScriptedBackend, for tests, or submit_tasks with dry_run, for agents",
    "OrbitExecutionBackend": "a session with nodes on another cluster (docs/allocations.md)",
    "RadicalExecutionBackend": "a session with nodes (docs/allocations.md), which holds the pilot itself",
    "StateMapper": "TaskState of rhapsody_mcp.api",
    "TasksMainStates": "TaskState of rhapsody_mcp.api",
    "discover_backends": "BACKENDS, which holds every kind by name",
    "get_backend": f"the class itself, as in `await {_DRAGON}`",
}
"""Names that users of rhapsody-py know, and what takes their place."""


class _DragonContext(multiprocessing.context.SpawnContext):
    """The spawn start method under the name "dragon", for programs written for Dragon.

    Spawn is enough in this process: tasks run in a Dragon runtime that the backend starts.
    """

    _name = "dragon"


_contexts: dict[str, multiprocessing.context.BaseContext] = vars(multiprocessing.context)["_concrete_contexts"]
_contexts.setdefault("dragon", _DragonContext())


def __getattr__(name: str) -> Any:
    for registration in BACKENDS.values():
        if registration.class_name == name:
            return registration.load_class()
    refuse_import(__name__, name, _OF_RHAPSODY_PY)
