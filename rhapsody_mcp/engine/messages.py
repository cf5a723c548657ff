"""The messages between a backend, its host, and its workers."""

from __future__ import annotations

from typing import Literal

import msgspec

from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import Call, Caps, Order
from rhapsody_mcp.model.states import Cause
from rhapsody_mcp.model.values import Stream, Value

__all__ = [
    "Ask",
    "Cancel",
    "Ended",
    "Failed",
    "Finished",
    "FromHost",
    "FromWorker",
    "Gone",
    "HostConfig",
    "Interrupt",
    "Listening",
    "Ping",
    "Place",
    "Plan",
    "Pong",
    "RankConfig",
    "Ready",
    "Result",
    "Revoked",
    "Run",
    "Started",
    "Stop",
    "ToBackend",
    "ToHost",
    "ToWorker",
    "Up",
    "WorkerConfig",
]

# --- backend → worker


class Run(msgspec.Struct, frozen=True, tag="run", gc=False):
    """Run this function."""

    uid: str
    call: Call
    bindings: dict[str, Value]
    folder: str
    attempt: int


class Interrupt(msgspec.Struct, frozen=True, tag="interrupt", gc=False):
    """Give this task back if it has not started; end it if it is running and `running` says so."""

    uid: str
    running: bool = True


ToWorker = Run | Interrupt


# --- worker → backend


class Result(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What a function came to: a value, or a cause with its message and traceback, and the pickled exception."""

    value: Value | None = None
    cause: Cause | None = None
    error: str = ""
    traceback: str = ""
    exception: bytes = b""
    mpi_alone: bool = False
    """Whether it was one rank of several and its MPI knew of no other."""


class Up(msgspec.Struct, frozen=True, tag="up", gc=False):
    """A worker can take tasks; the first message of its first connection."""

    worker: str


class Listening(msgspec.Struct, frozen=True, tag="listening", gc=False):
    """A worker can take interrupts; the first message of its second connection."""

    worker: str


class Started(msgspec.Struct, frozen=True, tag="started", gc=False):
    """The task's user code has started; the host says it of a task in processes of its own."""

    uid: str
    at: float


class Finished(msgspec.Struct, frozen=True, tag="finished", omit_defaults=True, gc=False):
    """A function has ended; `interrupted` where an Interrupt ended it. `left_running` counts the processes that it had
    started and not waited for, which were ended."""

    uid: str
    started: float
    ended: float
    result: Result
    stdout: Stream = Stream()
    stderr: Stream = Stream()
    interrupted: bool = False
    left_running: int = 0


class Revoked(msgspec.Struct, frozen=True, tag="revoked", gc=False):
    """This task will never start here."""

    uid: str


FromWorker = Up | Listening | Started | Finished | Revoked


# --- backend → host


class Place(msgspec.Struct, frozen=True, tag="place", gc=False):
    """Start a worker of this name."""

    worker: str


class Stop(msgspec.Struct, frozen=True, tag="stop", gc=False):
    """End this worker with everything under it."""

    worker: str


class Ask(msgspec.Struct, frozen=True, tag="ask", gc=False):
    """Run this task in processes of its own."""

    order: Order


class Cancel(msgspec.Struct, frozen=True, tag="cancel", gc=False):
    uid: str


class Ping(msgspec.Struct, frozen=True, tag="ping", gc=False):
    """Say Pong."""


ToHost = Place | Stop | Ask | Cancel | Ping


# --- host → backend


class Ready(msgspec.Struct, frozen=True, tag="ready", gc=False):
    """The host can place processes on this node."""

    host: str
    pid: int
    cores: int
    gpus: int


class Gone(msgspec.Struct, frozen=True, tag="gone", gc=False):
    """A worker has ended with this exit code, and nothing under it is left; `why` where the host has ended it.

    The files whose names begin with `printed` and a dot hold what the function printed that it was running.
    """

    worker: str
    exit_code: int
    why: str = ""
    printed: str = ""


class Ended(msgspec.Struct, frozen=True, tag="ended", gc=False):
    uid: str
    outcome: Outcome


class Failed(msgspec.Struct, frozen=True, tag="failed", gc=False):
    """A worker could not be placed."""

    worker: str
    error: str


class Pong(msgspec.Struct, frozen=True, tag="pong", gc=False):
    """The host still answers."""


FromHost = Ready | Gone | Started | Ended | Failed | Pong
ToBackend = FromWorker | FromHost


# --- what a program is started with, in a file


class HostConfig(msgspec.Struct, frozen=True, gc=False):
    """`address` is the backend's socket, in a folder that only this user can enter; `mark` marks processes.

    `batch` sends workers through Dragon's Batch. A worker that has been stopped for `stall_s` is ended.
    """

    placer: Literal["dragon", "local"]
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
    """A function of `order` in a process of its own, or a program whose arguments are pickled results."""

    order: Order
    sys_path: list[str]
    caps: Caps = Caps()


class Plan(msgspec.Struct, frozen=True, gc=False):
    """What a supervisor starts, which reads it as a dict with these keys, marshaled: it imports no msgspec.

    `env` changes the supervisor's own; None removes a variable. The program runs in `cwd`, which may begin in `folder`,
    the session's. `note` is what is written down of the start of a task, and None for a worker. The supervisor says to
    the datagram socket `started` when its program starts, with blanks in between: the name of this plan, the processes
    that must not stand still (itself and, of a worker, that, with a comma), the time, and the uid of a task.
    """

    arguments: list[str]
    folder: str = "/"
    cwd: str = ""
    env: dict[str, str | None] = {}
    cpus: tuple[int, ...] = ()
    output_bytes: int | None = None
    note: tuple[str, str, int] | None = None
    started: str = ""
