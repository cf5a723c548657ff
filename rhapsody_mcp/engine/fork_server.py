"""The fork server of a node agent: starts plans with idle supervisors (0.5 ms) or forked ones (2 ms), not with new
Python processes (15 ms).

    python -I -S -c COMMAND FOLDER SOCKET

SOCKET is a descriptor. The server reads lines: `start NAME` starts the plan FOLDER/NAME, and `SIGNAL NAME` sends a
signal to its supervisor. It writes `NAME CODE` when the plan's processes have ended. At end-of-file, the server ends
itself and all its descendants.
"""

from __future__ import annotations

import os
import select
import sys

from rhapsody_mcp.engine.process.tree import adopt_orphans, descendants, end
from rhapsody_mcp.engine.supervisor import run_forked_child, run_plans, write_outcome
from rhapsody_mcp.engine.task.start_log import NOT_STARTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal

__all__ = ["main"]

_MAX_IDLE = 8
_MAX_REUSABLE = 256  # each takes a descriptor of this process; further supervisors run only one plan


def main() -> NoReturn:
    folder, socket = sys.argv[1], int(sys.argv[2])
    adopt_orphans()
    server = _ForkServer(folder, socket)
    try:
        server.serve()
    finally:
        server.end()


class _ForkServer:
    def __init__(self, folder: str, socket: int) -> None:
        self.folder, self.socket = folder, socket
        self.pipes: dict[int, int] = {}
        """Supervisor's process id to the pipe for the names of its next plans; -1 if it runs only one plan."""
        self.names: dict[int, str] = {}
        """Supervisor's process id to the name of the plan that it runs."""
        self.pids: dict[str, int] = {}
        """Plan name to the process id of its supervisor."""
        self.idle: list[int] = []
        """Process ids of supervisors that wait for a plan."""
        self.reassigned_plans: set[str] = set()
        """Plans that were given to an idle supervisor and did not get a signal since."""
        self.idle_reader, self.idle_writer = os.pipe()
        self.wake_reader, self.wake_writer = os.pipe()
        os.set_blocking(self.wake_reader, False)
        os.set_blocking(self.wake_writer, False)

    def serve(self) -> None:
        """Serve requests until the node agent has ended: then return, or raise OSError."""
        signal.set_wakeup_fd(self.wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        rest = b""
        while True:
            readable, _, _ = select.select([self.socket, self.idle_reader, self.wake_reader], [], [])
            if self.idle_reader in readable:
                for pid in os.read(self.idle_reader, 4096).split():
                    self._mark_idle(int(pid))
            if self.wake_reader in readable:
                os.read(self.wake_reader, 4096)
                self._collect()
            if self.socket in readable:
                data = os.read(self.socket, 1 << 16)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    command, _, name = line.decode().partition(" ")
                    self._execute(command, name)

    def _execute(self, command: str, name: str) -> None:
        if command == "start":
            self._start(name)
        elif name in self.pids:
            self.reassigned_plans.discard(name)
            os.kill(self.pids[name], int(command))

    def _start(self, name: str) -> None:
        """Give a plan to an idle supervisor, or fork a new one."""
        if self.idle:
            self.reassigned_plans.add(name)
            self._reuse(self.idle.pop(), name)
            return
        try:
            self._fork(name)
        except OSError as error:  # the process limit is reached
            write_outcome(f"{self.folder}/{name}", "lost", NOT_STARTED.format(error.strerror))
            self._send(name, 1)

    def _reuse(self, pid: int, name: str) -> None:
        self.names[pid], self.pids[name] = name, pid
        try:
            os.kill(pid, signal.SIGCONT)  # nobody checks whether an idle supervisor is stopped
            os.write(self.pipes[pid], name.encode())
        except OSError:  # it was just killed; _collect will start the plan again
            return

    def _fork(self, name: str) -> None:
        ends = os.pipe() if len(self.pipes) < _MAX_REUSABLE else ()
        try:
            pid = os.fork()
        except OSError:
            for descriptor in ends:
                os.close(descriptor)
            raise
        name_pipe, pipe = ends or (-1, -1)
        if pid == 0:
            run_forked_child(lambda: self._run_supervisor(name, name_pipe, pipe))
        if name_pipe >= 0:
            os.close(name_pipe)
        self.pipes[pid], self.names[pid], self.pids[name] = pipe, name, pid

    def _mark_idle(self, pid: int) -> None:
        """Report the end of a supervisor's plan, and mark the supervisor as idle."""
        if pid not in self.names:  # it was killed after it reported itself idle
            return
        self._report_plan_end(pid, 0)
        self.idle.append(pid)
        if len(self.idle) > _MAX_IDLE:
            os.kill(self.idle.pop(0), signal.SIGTERM)

    def _send(self, name: str, code: int) -> None:
        os.write(self.socket, f"{name} {code}\n".encode())

    def _report_plan_end(self, pid: int, code: int) -> None:
        """Report to the node agent that the plan of this supervisor has ended."""
        name = self.names.pop(pid)
        del self.pids[name]
        self.reassigned_plans.discard(name)
        self._send(name, code)

    def _run_supervisor(self, name: str, name_pipe: int, pipe: int) -> NoReturn:
        """In the forked child: close the descriptors of the server, and run plans."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (
            self.socket,
            self.idle_reader,
            self.wake_reader,
            self.wake_writer,
            pipe,
            *self.pipes.values(),
        ):
            if descriptor >= 0:
                os.close(descriptor)
        os.setsid()
        run_plans(self.folder, name, name_pipe, self.idle_writer)

    def _collect(self) -> None:
        """Collect the supervisors that have ended. The kernel makes this process the parent of a killed supervisor's
        children."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid not in self.pipes:
                continue
            if (pipe := self.pipes.pop(pid)) >= 0:
                os.close(pipe)
            if pid in self.idle:
                self.idle.remove(pid)
            if pid in self.names:
                self._handle_supervisor_exit(pid, os.waitstatus_to_exitcode(status))

    def _handle_supervisor_exit(self, pid: int, code: int) -> None:
        """Report the plan of a supervisor that ended; if the supervisor ended before it read the plan, start the plan
        again."""
        name = self.names[pid]
        if name in self.reassigned_plans and os.path.exists(f"{self.folder}/{name}"):
            self.reassigned_plans.remove(name)
            del self.names[pid], self.pids[name]
            self._start(name)
            return
        if code:
            self._end_strays()
        self._report_plan_end(pid, code)

    def _end_strays(self) -> None:
        """End the descendants of this process that do not descend from a supervisor."""
        end(lambda: descendants(os.getpid(), excluded=self.pipes), collect_children=False)

    def end(self) -> NoReturn:
        """End all descendants of this process, then this process."""
        self.pipes.clear()
        self._end_strays()
        os._exit(0)
