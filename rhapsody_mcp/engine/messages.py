"""The messages between a backend, its node agents, and its workers."""

from __future__ import annotations

from typing import Literal

import msgspec

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, Caps, TaskRun
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Stream, Value

__all__ = [
    "CancelTask",
    "FromHost",
    "FromWorker",
    "FunctionFinished",
    "FunctionResult",
    "HostConfig",
    "Interrupt",
    "LauncherName",
    "NodeReady",
    "Ping",
    "Pong",
    "ProcessPlan",
    "RankConfig",
    "RunFunction",
    "StartTask",
    "StartWorker",
    "StopWorker",
    "TaskEnded",
    "TaskRevoked",
    "TaskStarted",
    "ToBackend",
    "ToHost",
    "ToWorker",
    "WorkerConfig",
    "WorkerExited",
    "WorkerListening",
    "WorkerReady",
    "WorkerStartFailed",
]

LauncherName = Literal["dragon", "local"]
"""What starts the processes of an engine: Dragon, or forks of this machine."""

# --- backend → worker


class RunFunction(msgspec.Struct, frozen=True, tag="run", gc=False):
    """Run this function."""

    uid: str
    call: Call
    bindings: dict[str, Value]
    results_folder: str
    attempt: int


class Interrupt(msgspec.Struct, frozen=True, tag="interrupt", gc=False):
    """Give this task back if it has not started; end it if it is running and `running` says so."""

    uid: str
    running: bool = True


ToWorker = RunFunction | Interrupt


# --- worker → backend


class FunctionResult(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The result of a function: a value, or a cause with its message and traceback, and the pickled exception."""

    value: Value | None = None
    cause: Cause | None = None
    error: str = ""
    traceback: str = ""
    exception: bytes = b""
    mpi_alone: bool = False
    """Whether it was one rank of several and its MPI knew of no other."""


class WorkerReady(msgspec.Struct, frozen=True, tag="worker_ready", gc=False):
    """A worker can take tasks; the first message of its first connection."""

    worker: str


class WorkerListening(msgspec.Struct, frozen=True, tag="worker_listening", gc=False):
    """A worker can take interrupts; the first message of its second connection."""

    worker: str


class TaskStarted(msgspec.Struct, frozen=True, tag="started", gc=False):
    """The task's user code has started; a node agent sends it for a task in processes of its own."""

    uid: str
    at: float


class FunctionFinished(msgspec.Struct, frozen=True, tag="finished", omit_defaults=True, gc=False):
    """A function has ended; `interrupted` where an Interrupt ended it. `left_running` counts the processes that it had
    started and not waited for, which were ended."""

    uid: str
    started: float
    ended: float
    result: FunctionResult
    stdout: Stream = Stream()
    stderr: Stream = Stream()
    interrupted: bool = False
    left_running: int = 0


class TaskRevoked(msgspec.Struct, frozen=True, tag="revoked", gc=False):
    """This task will never start here."""

    uid: str


FromWorker = WorkerReady | WorkerListening | TaskStarted | FunctionFinished | TaskRevoked


# --- backend → node agent


class StartWorker(msgspec.Struct, frozen=True, tag="start_worker", gc=False):
    """Start a worker of this name."""

    worker: str


class StopWorker(msgspec.Struct, frozen=True, tag="stop_worker", gc=False):
    """End this worker with everything under it."""

    worker: str


class StartTask(msgspec.Struct, frozen=True, tag="start_task", gc=False):
    """Run this task in processes of its own."""

    task_run: TaskRun


class CancelTask(msgspec.Struct, frozen=True, tag="cancel_task", gc=False):
    """End the processes of this task."""

    uid: str


class Ping(msgspec.Struct, frozen=True, tag="ping", gc=False):
    """Say Pong."""


ToHost = StartWorker | StopWorker | StartTask | CancelTask | Ping


# --- node agent → backend


class NodeReady(msgspec.Struct, frozen=True, tag="node_ready", gc=False):
    """A node agent can launch processes; what its node has."""

    host: str
    pid: int
    cores: int
    gpus: int
    memory_gib: float | None


class WorkerExited(msgspec.Struct, frozen=True, tag="worker_exited", gc=False):
    """A worker has ended with this exit code, and nothing under it is left; `why` where the node agent has ended it.

    The files whose names begin with `output_path` and a dot hold the output of the function that it was running.
    """

    worker: str
    exit_code: int
    why: str = ""
    output_path: str = ""


class TaskEnded(msgspec.Struct, frozen=True, tag="task_ended", gc=False):
    """A task in processes of its own has ended, and no process of it is left."""

    uid: str
    outcome: Outcome


class WorkerStartFailed(msgspec.Struct, frozen=True, tag="worker_start_failed", gc=False):
    """A worker could not be started."""

    worker: str
    error: str


class Pong(msgspec.Struct, frozen=True, tag="pong", gc=False):
    """The node agent still answers."""


FromHost = NodeReady | WorkerExited | TaskStarted | TaskEnded | WorkerStartFailed | Pong
ToBackend = FromWorker | FromHost


# --- what a program is started with, in a file


class HostConfig(msgspec.Struct, frozen=True, gc=False):
    """`address` is the backend's socket, in a folder that only this user can enter; `mark` marks processes.

    `batch` sends workers through Dragon's Batch. A worker that has been stopped for `stall_s` is ended.
    """

    launcher: LauncherName
    mark: str
    address: str
    folder: str
    sys_path: list[str]
    cwd: str
    batch: bool = False
    stall_s: float = 10.0
    caps: Caps = Caps()


class WorkerConfig(msgspec.Struct, frozen=True, gc=False):
    """A worker that connects to `address`; `cwd` is the folder of its session."""

    worker: str
    address: str
    sys_path: list[str]
    cwd: str
    caps: Caps = Caps()


class RankConfig(msgspec.Struct, frozen=True, gc=False):
    """The function of a task in a process of its own, or a program whose arguments are pickled results."""

    task_run: TaskRun
    sys_path: list[str]
    caps: Caps = Caps()


class ProcessPlan(msgspec.Struct, frozen=True, gc=False):
    """What a supervisor starts, which reads it as a dict with these keys, marshaled: it imports no msgspec.

    `env` changes the supervisor's own; None removes a variable. The program runs in `cwd`, which may begin in `folder`,
    the session's. `note` is the start note of a task, and None for a worker. When its program starts, the supervisor
    sends to the datagram socket `started`, with blanks in between: the name of this plan, the processes that must not
    stand still (the supervisor and, with a comma, a worker), the time, and the uid of a task.
    """

    arguments: list[str]
    folder: str = "/"
    cwd: str = ""
    env: dict[str, str | None] = {}
    cpus: tuple[int, ...] = ()
    output_bytes: int | None = None
    note: tuple[str, str, int] | None = None
    started: str = ""
