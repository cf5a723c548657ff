"""The Python API: tasks, sessions, executors and their exceptions."""

from typing import NoReturn

from rhapsody_mcp.api.executor import SessionExecutor
from rhapsody_mcp.api.session import Session
from rhapsody_mcp.model.errors import (
    BackendUnavailable,
    InvalidTask,
    RhapsodyError,
    SessionClosed,
    UnknownName,
    refuse_import,
)
from rhapsody_mcp.model.live.output import OutputQuery
from rhapsody_mcp.model.outcome import TaskCanceled, TaskFailed
from rhapsody_mcp.model.states import TaskState
from rhapsody_mcp.runtime.serialization import Module, Source
from rhapsody_mcp.runtime.tasks import AITask, ComputeTask, Condition, ForEach, Part, Text

__all__ = [
    "AITask",
    "BackendUnavailable",
    "ComputeTask",
    "Condition",
    "ForEach",
    "InvalidTask",
    "Module",
    "OutputQuery",
    "Part",
    "RhapsodyError",
    "Session",
    "SessionClosed",
    "SessionExecutor",
    "Source",
    "TaskCanceled",
    "TaskFailed",
    "TaskState",
    "Text",
    "UnknownName",
]

_OF_RHAPSODY_PY = {
    "BackendError": "BackendUnavailable",
    "BaseTask": "ComputeTask and AITask",
    "ResourceError": "InvalidTask, which submit_tasks raises for what never fits",
    "SessionError": "SessionClosed and RhapsodyError",
    "TaskExecutionError": "TaskFailed, which awaiting a task raises",
    "TaskStateManager": "Session, whose tasks are updated in place",
    "TaskValidationError": "InvalidTask",
    "enable_logging": 'logging.getLogger("rhapsody_mcp").setLevel(logging.DEBUG)',
}
"""Names that users of rhapsody-py know, and what takes their place."""


def __getattr__(name: str) -> NoReturn:
    refuse_import(__name__, name, _OF_RHAPSODY_PY)
