"""Backends, opened by name: only the one that is asked for is imported.

Importing this package makes `multiprocessing.set_start_method("dragon")` work in a plain Python process, where it
means spawn; under Dragon its own start method stays.
"""

from __future__ import annotations

import multiprocessing.context
from importlib import import_module
from typing import TYPE_CHECKING, Any

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
]

BACKENDS = {
    "dragon": "DragonExecutionBackendV3",
    "local": "LocalExecutionBackend",
    "vllm": "DragonVllmInferenceBackend",
    "endpoint": "EndpointInferenceBackend",
}
"""The class of each backend, by its default name."""
_MODULES = {"vllm": "vllm.backend"}
"""Where a class is in a module of another name than its backend's."""


class _DragonContext(multiprocessing.context.SpawnContext):
    """Plain spawn under the name that programs for Dragon ask for: tasks run in the backend's own Dragon."""

    _name = "dragon"


_contexts: dict[str, multiprocessing.context.BaseContext] = vars(multiprocessing.context)["_concrete_contexts"]
_contexts.setdefault("dragon", _DragonContext())


def __getattr__(name: str) -> Any:
    for backend, backend_class in BACKENDS.items():
        if backend_class == name:
            module = import_module(f"rhapsody_mcp.backends.{_MODULES.get(backend, backend)}")
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
