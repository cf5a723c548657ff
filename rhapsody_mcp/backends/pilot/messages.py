"""The messages between the service and a pilot.

Each end numbers its orders or events, and sends them again after a new connection until the other end has acknowledged
them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rhapsody_mcp.backends.base import Event
from rhapsody_mcp.model.live.output import OutputPart, OutputQuery
from rhapsody_mcp.model.specs import TaskRun

__all__ = [
    *(
        "Ack",
        "AskOutput",
        "BackendFacts",
        "BackendLost",
        "BackendReady",
        "BackendRefused",
        "BackendRested",
        "Body",
        "Cancel",
        "Prioritize",
        "Draining",
    ),
    *("Events", "FromPilot", "FromService", "Hello", "Numbered", "OutputTold", "PilotConfig", "PilotReady"),
    *("PlannedBackend", "Progress", "Release", "Rest", "Start", "Submit"),
]

# --- both ways


class Hello(msgspec.Struct, frozen=True, tag="hello", gc=False):
    """The first message on a connection. `life` names the run of the sending process; `received` is the number of the
    last message that it has from the run `of` of the other end."""

    life: str
    of: str
    received: int


class Ack(msgspec.Struct, frozen=True, tag="ack", gc=False):
    """All messages up to this number have arrived for good; the sender need not keep them."""

    number: int


# --- service → pilot


class Start(msgspec.Struct, frozen=True, tag="start", gc=False):
    """Start a backend."""

    backend: str


class Submit(msgspec.Struct, frozen=True, tag="submit", gc=False):
    """Run these tasks. A task whose uid and attempt the pilot has had is not run again: its last event is reported
    again."""

    backend: str
    task_runs: list[TaskRun]


class Cancel(msgspec.Struct, frozen=True, tag="cancel", gc=False):
    """End these tasks."""

    backend: str
    uids: list[str]


class AskOutput(msgspec.Struct, frozen=True, tag="ask_output", gc=False):
    """Read what a running task has printed so far; request an OutputTold with the same number."""

    backend: str
    number: int
    uid: str
    query: OutputQuery


class Prioritize(msgspec.Struct, frozen=True, tag="prioritize", gc=False):
    """Give waiting tasks, by uid, these priorities."""

    backend: str
    priorities: dict[str, int]


class Rest(msgspec.Struct, frozen=True, tag="rest", gc=False):
    """End the engine of a backend, which has no task."""

    backend: str


class Release(msgspec.Struct, frozen=True, tag="release", gc=False):
    """End everything, and give the nodes back."""


FromService = Start | Submit | Cancel | Prioritize | AskOutput | Rest | Release


# --- pilot → service


class PilotReady(msgspec.Struct, frozen=True, tag="pilot_ready", gc=False):
    """The pilot runs on `host`. `folder` is its own folder there; `sees_folder` is whether that node sees the folder of
    the session. `ends` is the end of the allocation in seconds since the epoch; `nodes` are its nodes, where known."""

    host: str
    folder: str
    sees_folder: bool
    ends: float
    nodes: tuple[str, ...] = ()


class BackendReady(msgspec.Struct, frozen=True, tag="ready", gc=False):
    """The backend has started."""

    backend: str


class BackendRefused(msgspec.Struct, frozen=True, tag="refused", gc=False):
    """The backend did not start. `again` is True where another start may succeed."""

    backend: str
    reason: str
    again: bool


class BackendRested(msgspec.Struct, frozen=True, tag="rested", gc=False):
    """No process of the backend's engine is left."""

    backend: str


class BackendLost(msgspec.Struct, frozen=True, tag="lost", gc=False):
    """A part of the backend's engine is lost."""

    backend: str
    reason: str


class Draining(msgspec.Struct, frozen=True, tag="draining", gc=False):
    """The allocation ends soon: the backend starts no further task, and returns those that have not started."""

    backend: str
    reason: str


class Progress(msgspec.Struct, frozen=True, tag="progress", gc=False):
    """What the backend does now, in words."""

    backend: str
    text: str


class BackendFacts(msgspec.Struct, frozen=True, tag="facts", gc=False):
    """What the backend says of itself."""

    backend: str
    facts: dict[str, Any]


class OutputTold(msgspec.Struct, frozen=True, tag="output_told", gc=False):
    """The answer to an AskOutput, without parts where the task does not run."""

    backend: str
    number: int
    parts: tuple[OutputPart, OutputPart] | None


class Events(msgspec.Struct, frozen=True, tag="events", gc=False):
    """Events of tasks, in order. `attempts` has the number of the attempt of each event's task."""

    backend: str
    events: list[Event]
    attempts: list[int]


FromPilot = (
    PilotReady
    | BackendReady
    | BackendRefused
    | BackendRested
    | BackendLost
    | Draining
    | Progress
    | BackendFacts
    | OutputTold
    | Events
)

Body = FromService | FromPilot


class Numbered(msgspec.Struct, frozen=True, tag="numbered", gc=False):
    """A message with its number; numbers count from 1 in each run of the sending process."""

    number: int
    body: Body


# --- the pilot's configuration


class PlannedBackend(msgspec.Struct, frozen=True, gc=False):
    """A backend of the pilot: its name in the table of backends, the arguments of its class, and the working directory
    of its tasks."""

    name: str
    arguments: dict[str, Any]
    folder: str = ""


class PilotConfig(msgspec.Struct, frozen=True, gc=False):
    """The configuration of a pilot, as JSON in the environment variable `RHAPSODY_PILOT`.

    The pilot dials the addresses, or those in the file at `address_file` where it can read the file: another service
    may have taken over. It ends by itself after `orphan_s` seconds without a service and without a task. `drain_s`
    seconds before the end of the allocation the pilot starts no further task.
    """

    addresses: list[str]
    port: int
    address_file: str
    pem: str
    backends: list[PlannedBackend]
    folder: str
    sys_path: list[str]
    orphan_s: float
    minutes: int
    drain_s: float
