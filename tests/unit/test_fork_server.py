"""What the fork server does where the machine gives it no process more, and which supervisors it keeps."""

from __future__ import annotations

import errno
import marshal
import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from rhapsody_mcp.engine import supervisor
from rhapsody_mcp.engine.fork_server import _ForkServer
from rhapsody_mcp.engine.messages import ProcessPlan
from rhapsody_mcp.engine.node import launchers
from rhapsody_mcp.engine.node.launchers import ForkLauncher, Program
from rhapsody_mcp.engine.process.tree import LIFELINE
from rhapsody_mcp.engine.task.rank_result import rank_end
from rhapsody_mcp.model.specs import Command, Layout, TaskRun, TaskSpec, Template
from rhapsody_mcp.model.states import Cause

TOLD = "its process could not be started: Resource temporarily unavailable"


def refuse(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def written(plan: ProcessPlan, path: Path) -> str:
    path.write_bytes(marshal.dumps(msgspec.to_builtins(plan)))
    return str(path)


def lost(folder: Path) -> tuple[Cause | None, str, float | None]:
    spec = TaskSpec(uid="task.000001", work=Command("true"), layout=Layout("process"))
    found = rank_end(
        str(folder / "p1"), TaskRun(spec=spec, bindings={}, results_folder=str(folder), attempt=1), 0, None
    )
    assert found is not None
    return found.outcome.cause, found.outcome.error, found.started


def test_a_task_without_a_supervisor_is_lost_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = _ForkServer(str(tmp_path), theirs.fileno())
        monkeypatch.setattr(os, "fork", refuse)
        server._execute("start", "p1")
        assert ours.recv(100) == b"p1 1\n"
    assert lost(tmp_path) == (Cause.LOST, TOLD, None)


def test_a_supervisor_without_a_child_leaves_a_lost_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_spawn", refuse)
    monkeypatch.setattr("_signal.pthread_sigmask", lambda *_: set())
    plan = ProcessPlan(["true"], env={}, start_log_entry=(str(tmp_path), "task.000001", 1))
    assert supervisor._Supervisor(written(plan, tmp_path / "p1"), -1).run() == 0
    assert lost(tmp_path) == (Cause.LOST, TOLD, None)


SERVER = (
    "import sys; sys.path.append(sys.argv.pop(1)); from rhapsody_mcp.engine import fork_server; "
    "fork_server._MAX_REUSABLE = int(sys.argv.pop(1)); fork_server.main()"
)


@pytest.mark.parametrize(("most", "supervisors"), [(256, 1), (0, 3)])
def test_it_keeps_no_more_supervisors_than_it_has_room_for(
    most: int, supervisors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(Path(supervisor.__file__).parents[2])
    program = [sys.executable, "-I", "-S", "-c", SERVER, root, str(most)]
    monkeypatch.setattr(launchers, "command", lambda _, *arguments: [*program, *arguments])
    monkeypatch.setenv(LIFELINE, str(tmp_path / "lifeline"))
    os.mkfifo(tmp_path / "lifeline")
    writer = os.open(tmp_path / "lifeline", os.O_RDWR)
    launcher = ForkLauncher(str(tmp_path), lambda: None)
    try:
        for number in range(3):
            plan = ProcessPlan(
                ["sh", "-c", "echo $PPID"], folder=str(tmp_path), start_log_entry=(str(tmp_path), f"task.{number}", 1)
            )
            path = written(plan, tmp_path / f"p{number}")
            assert launcher.launch(Program([path], {}, Template())).join() == 0
    finally:
        launcher._socket.shutdown(socket.SHUT_RDWR)
        assert launcher._server.wait(10) == 0
        launcher._socket.close()
        os.close(writer)
    assert len({(tmp_path / f"p{number}.out").read_text() for number in range(3)}) == supervisors
