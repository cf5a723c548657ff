"""What the fork server does where the machine gives it no process more."""

from __future__ import annotations

import errno
import marshal
import os
import socket
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from rhapsody_mcp.engine import supervisor
from rhapsody_mcp.engine.fork_server import _ForkServer
from rhapsody_mcp.engine.printing import Trimmer
from rhapsody_mcp.engine.rank_end import rank_end
from rhapsody_mcp.engine.wire import Plan
from rhapsody_mcp.model.specs import Command, Layout, Order, TaskSpec
from rhapsody_mcp.model.states import Cause

TOLD = "its process could not be started: Resource temporarily unavailable"


def refuse(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def lost(folder: Path) -> tuple[Cause | None, str, float | None]:
    spec = TaskSpec(uid="task.000001", work=Command("true"), layout=Layout("process"))
    found = rank_end(str(folder / "p1"), Order(spec=spec, bindings={}, folder=str(folder), attempt=1), 0, None)
    assert found is not None
    return found.outcome.cause, found.outcome.error, found.started


def test_a_task_without_a_supervisor_is_lost_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = _ForkServer(str(tmp_path), theirs.fileno())
        monkeypatch.setattr(os, "fork", refuse)
        server._obey("start", "p1")
        assert ours.recv(100) == b"p1 1\n"
    assert lost(tmp_path) == (Cause.LOST, TOLD, None)


def test_a_supervisor_without_a_child_leaves_a_lost_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_spawn", refuse)
    monkeypatch.setattr("_signal.pthread_sigmask", lambda *_: set())
    plan = Plan(["true"], env={}, note=(str(tmp_path), "task.000001", 1))
    path = tmp_path / "p1"
    path.write_bytes(marshal.dumps(msgspec.to_builtins(plan)))
    assert supervisor._Supervisor(str(path), -1, Trimmer()).run() == 0
    assert lost(tmp_path) == (Cause.LOST, TOLD, None)
