"""The messages between a backend, its node agents, and its workers."""

from __future__ import annotations

from typing import Literal

import msgspec

from rhapsody_mcp.model.live.output import OutputPart, OutputQuery
from rhapsody_mcp.model.live.progress import Progress
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, Caps, TaskRun
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Stream, Value

__all__ = [
    "CancelTask",
    "Devices",
    "FromHost",
    "FromServers",
    "FromWorker",
    "FunctionFinished",
    "FunctionResult",
    "HostConfig",
    "Interrupt",
    "LauncherName",
    "NodeReady",
    "OutputRead",
    "OutputTaken",
    "Ping",
    "Pong",
    "ProcessPlan",
    "RankConfig",
    "RanksPrepared",
    "ReadOutput",
    "RunFunction",
    "ServersLost",
    "ServersReady",
    "ServersRefused",
    "StartTask",
    "StartWorker",
    "StepEnded",
    "StopWorker",
    "TakeOutput",
    "TaskEnded",
    "TaskProgressed",
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
"""The launcher of an engine's processes: Dragon, or forks on this machine."""

# --- backend → worker


class RunFunction(msgspec.Struct, frozen=True, omit_defaults=True, tag="run", gc=False):
    """Run a function; the result is stored in `folder` if it is long. `variables` are added to the environment."""

    uid: str
    call: Call
    bindings: dict[str, Value]
    results_folder: str
    attempt: int
    variables: dict[str, str] = {}


class Interrupt(msgspec.Struct, frozen=True, tag="interrupt", gc=False):
    """Revoke a task that has not started; interrupt a running task only if `running` is True."""

    uid: str
    running: bool = True


ToWorker = RunFunction | Interrupt


# --- worker → backend


class FunctionResult(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The result of a function: a value, or the cause, message, traceback and pickled exception of a failure."""

    value: Value | None = None
    cause: Cause | None = None
    error: str = ""
    traceback: str = ""
    exception: bytes = b""
    notes: tuple[str, ...] = ()
    mpi_alone: bool = False
    """Whether the function ran as one rank of several, but its MPI world had size 1."""


class WorkerReady(msgspec.Struct, frozen=True, tag="worker_ready", gc=False):
    """The worker accepts tasks. This is the first message on its first connection."""

    worker: str


class WorkerListening(msgspec.Struct, frozen=True, tag="worker_listening", gc=False):
    """The worker accepts interrupts. This is the first message on its second connection."""

    worker: str


class TaskStarted(msgspec.Struct, frozen=True, tag="started", gc=False):
    """User code of the task has started, at `at` seconds since the epoch. A worker sends it, and for a task in
    processes of its own the node agent."""

    uid: str
    at: float


class FunctionFinished(msgspec.Struct, frozen=True, tag="finished", omit_defaults=True, gc=False):
    """A function has ended; `interrupted` is True if an Interrupt ended it. `left_running` counts the processes that
    the function started and did not wait for; the worker ended them. `cpu_s` are CPU seconds, without those of other
    processes."""

    uid: str
    started: float
    ended: float
    result: FunctionResult
    stdout: Stream = Stream()
    stderr: Stream = Stream()
    interrupted: bool = False
    left_running: int = 0
    progress: Progress | None = None
    cpu_s: float = 0.0


class TaskRevoked(msgspec.Struct, frozen=True, tag="revoked", gc=False):
    """The worker will not start this task."""

    uid: str


FromWorker = WorkerReady | WorkerListening | TaskStarted | FunctionFinished | TaskRevoked


# --- backend → node agent


class StartWorker(msgspec.Struct, frozen=True, tag="start_worker", gc=False):
    """Start a worker with this name."""

    worker: str


class StopWorker(msgspec.Struct, frozen=True, tag="stop_worker", gc=False):
    """End a worker and its descendants."""

    worker: str


class Devices(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """The cores that a process is bound to, and the GPUs that it may use, by their numbers on the node. Without cores
    it is not bound."""

    cpus: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()


class StartTask(msgspec.Struct, frozen=True, tag="start_task", gc=False):
    """Run a task in processes of its own: all its ranks, or only `ranks` where the other ranks run on other nodes.

    `nodes` are the names of all nodes of the task, the node of rank 0 first. With `in_step`, the node agent prepares
    the ranks, and a step of the scheduler starts them on all nodes. `devices` are those of each rank here, in order;
    none for ranks that asked for none.
    """

    task_run: TaskRun
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()
    in_step: bool = False
    devices: tuple[Devices, ...] = ()


class StepEnded(msgspec.Struct, frozen=True, tag="step_ended", gc=False):
    """The step of a task has ended; ranks that it did not start never start. `problem` says why, and may be empty."""

    uid: str
    problem: str


class CancelTask(msgspec.Struct, frozen=True, tag="cancel_task", gc=False):
    """End the processes of a task on this node; `failed_rank` is the rank on another node whose failure ends them, and
    None for a cancellation."""

    uid: str
    failed_rank: int | None = None


class TakeOutput(msgspec.Struct, frozen=True, tag="take_output", gc=False):
    """Take what a worker that has exited had printed, from its files at `output_path`; request an OutputTaken. Without
    a results folder the files are only deleted."""

    output_path: str
    results_folder: str | None
    output_bytes: int | None


class ReadOutput(msgspec.Struct, frozen=True, tag="read_output", gc=False):
    """Read what a running task has printed so far; request an OutputRead with the same number.

    `worker` is the worker that runs the task, and empty for a task in processes of its own.
    """

    number: int
    uid: str
    worker: str
    query: OutputQuery


class Ping(msgspec.Struct, frozen=True, tag="ping", gc=False):
    """Request a Pong."""


ToHost = StartWorker | StopWorker | StartTask | StepEnded | CancelTask | TakeOutput | ReadOutput | Ping


# --- node agent → backend


class NodeReady(msgspec.Struct, frozen=True, tag="node_ready", gc=False):
    """The node agent can launch processes; the fields describe its node."""

    host: str
    pid: int
    cores: int
    gpus: int
    memory_gib: float | None
    cpus: tuple[int, ...] = ()
    """The numbers of its cores."""


class WorkerExited(msgspec.Struct, frozen=True, tag="worker_exited", gc=False):
    """A worker has ended with this exit code, and so have its descendants; `why` is set if the node agent ended the
    worker.

    The files whose names begin with `output_path` and a dot hold the output of the function that was running.
    """

    worker: str
    exit_code: int
    why: str = ""
    output_path: str = ""


class TaskEnded(msgspec.Struct, frozen=True, tag="task_ended", gc=False):
    """A task in processes of its own has ended on this node, and so have all its processes here."""

    uid: str
    outcome: Outcome


class WorkerStartFailed(msgspec.Struct, frozen=True, tag="worker_start_failed", gc=False):
    """A worker could not be started."""

    worker: str
    error: str


class RanksPrepared(msgspec.Struct, frozen=True, tag="ranks_prepared", gc=False):
    """The ranks of a task on this node can be started: each with its shell script, by rank."""

    uid: str
    scripts: dict[int, str]


class OutputTaken(msgspec.Struct, frozen=True, tag="output_taken", gc=False):
    """The answer to a TakeOutput; the files are deleted."""

    output_path: str
    stdout: Stream
    stderr: Stream


class OutputRead(msgspec.Struct, frozen=True, tag="output_read", gc=False):
    """The answer to a ReadOutput; without parts where the task does not run on this node now."""

    number: int
    parts: tuple[OutputPart, OutputPart] | None


class TaskProgressed(msgspec.Struct, frozen=True, tag="progressed", gc=False):
    """A running task has told how far it is."""

    uid: str
    rank: int
    progress: Progress


class Pong(msgspec.Struct, frozen=True, tag="pong", gc=False):
    """The answer to a Ping."""


FromHost = (
    NodeReady
    | WorkerExited
    | TaskStarted
    | TaskProgressed
    | TaskEnded
    | WorkerStartFailed
    | RanksPrepared
    | OutputTaken
    | OutputRead
    | Pong
)


# --- model servers of a node → backend


class ServersReady(msgspec.Struct, frozen=True, tag="servers_ready", gc=False):
    """The model servers on these ports of the node answer now; ports that were reported before may be among them."""

    host: str
    ports: list[int]


class ServersLost(msgspec.Struct, frozen=True, tag="servers_lost", gc=False):
    """The model servers on these ports of the node do not answer any more."""

    ports: list[int]
    reason: str


class ServersRefused(msgspec.Struct, frozen=True, tag="servers_refused", gc=False):
    """The model servers of the node did not start. `again` is True where another start may succeed."""

    host: str
    reason: str
    again: bool


FromServers = ServersReady | ServersLost | ServersRefused

ToBackend = FromWorker | FromHost | FromServers


# --- configuration of programs


class HostConfig(msgspec.Struct, frozen=True, gc=False):
    """The configuration of a node agent. `address` is the backend's socket, in a folder that only this user can enter;
    `mark` is the engine's mark.

    With `batch`, workers start through Dragon's Batch. A worker that was stopped for `stall_s` seconds is ended.
    `link_folder` is the folder of the node link; empty where the engine has one node.
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
    link_folder: str = ""


class WorkerConfig(msgspec.Struct, frozen=True, gc=False):
    """The configuration of a worker, which connects to `address`; `cwd` is the folder of its session."""

    worker: str
    address: str
    sys_path: list[str]
    cwd: str
    caps: Caps = Caps()
    link_folder: str = ""


class RankConfig(msgspec.Struct, frozen=True, gc=False):
    """The configuration of a rank: its task is a function, or a program whose arguments are pickled results. `python`
    is the version of the engine's Python, as in "3.11"."""

    task_run: TaskRun
    sys_path: list[str]
    caps: Caps = Caps()
    python: str = ""


class ProcessPlan(msgspec.Struct, frozen=True, gc=False):
    """The program that a supervisor starts. The supervisor reads the plan as a marshaled dict with these keys, because
    it does not import msgspec.

    `env` changes the supervisor's environment; None removes a variable. The program runs in `cwd`, which may be
    relative to `folder`, the session's folder. `start_log_entry` holds the arguments of `log_start` for a task, and is
    None for a worker.

    When the program starts, the supervisor sends to the datagram socket `start_events` these words, separated by
    blanks: the name of the plan; the processes that the node agent must end if they are stopped (the supervisor, and
    after a comma a worker); the start time; the uid of the task.
    """

    arguments: list[str]
    folder: str = "/"
    cwd: str = ""
    env: dict[str, str | None] = {}
    cpus: tuple[int, ...] = ()
    output_bytes: int | None = None
    start_log_entry: tuple[str, str, int] | None = None
    start_events: str = ""
