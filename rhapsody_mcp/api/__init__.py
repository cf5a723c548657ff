"""The Python API: tasks, sessions, executors and their exceptions."""

from rhapsody_mcp.api.executor import SessionExecutor
from rhapsody_mcp.api.session import Session
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidTask, RhapsodyError, SessionClosed, UnknownName
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
