"""The fork server of a host: a supervisor that it forks takes two milliseconds, one that is a new Python fifteen, and
one whose program has ended well, which takes the next, a half.

    python -I -S -c COMMAND FOLDER SOCKET

It takes lines from the socket, `start NAME` for the plan FOLDER/NAME and `SIGNAL NAME` for its supervisor, and writes
`NAME CODE` when all that it started has ended. It ends at end-of-file, with everything below it.
"""

from __future__ import annotations

import os
import select
import sys

from rhapsody_mcp.engine.process.tree import adopt_orphans, descendants, end
from rhapsody_mcp.engine.supervisor import attend, finish, write_outcome
from rhapsody_mcp.engine.task.start_log import NOT_STARTED

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal

__all__ = ["main"]

_MOST_IDLE = 8
_MOST_KEPT = 256  # each takes a file descriptor here; of more, each is for one plan


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
        """By supervisor, that through which it gets the names of further plans, or -1."""
        self.names: dict[int, str] = {}
        self.pids: dict[str, int] = {}
        self.idle: list[int] = []
        self.kept: set[str] = set()
        """Plans of supervisors that had nothing to do, which none was told to end."""
        self.free, self.done = os.pipe()
        self.ended, self.wake = os.pipe()
        os.set_blocking(self.ended, False)
        os.set_blocking(self.wake, False)

    def serve(self) -> None:
        """Returns, or raises OSError, when the host has ended."""
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        rest = b""
        while True:
            readable, _, _ = select.select([self.socket, self.free, self.ended], [], [])
            if self.free in readable:
                for pid in os.read(self.free, 4096).split():
                    self._mark_idle(int(pid))
            if self.ended in readable:
                os.read(self.ended, 4096)
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
            self.kept.discard(name)
            os.kill(self.pids[name], int(command))

    def _start(self, name: str) -> None:
        """Give a plan to an idle supervisor, or to a new one."""
        if self.idle:
            self.kept.add(name)
            self._reuse(self.idle.pop(), name)
            return
        try:
            self._fork(name)
        except OSError as error:  # no process more than these
            write_outcome(f"{self.folder}/{name}", "lost", NOT_STARTED.format(error.strerror))
            self._send(name, 1)

    def _reuse(self, pid: int, name: str) -> None:
        self.names[pid], self.pids[name] = name, pid
        try:
            os.kill(pid, signal.SIGCONT)  # it may have been stopped meanwhile, which nobody looks for
            os.write(self.pipes[pid], name.encode())
        except OSError:  # it has just been killed, and is collected
            return

    def _fork(self, name: str) -> None:
        ends = os.pipe() if len(self.pipes) < _MOST_KEPT else ()
        try:
            pid = os.fork()
        except OSError:
            for descriptor in ends:
                os.close(descriptor)
            raise
        names, pipe = ends or (-1, -1)
        if pid == 0:
            finish(lambda: self._become(name, names, pipe))
        if names >= 0:
            os.close(names)
        self.pipes[pid], self.names[pid], self.pids[name] = pipe, name, pid

    def _mark_idle(self, pid: int) -> None:
        """The plan of a supervisor has ended well; the supervisor waits for another plan."""
        if pid not in self.names:  # it was killed after it had said so
            return
        self._report_plan_end(pid, 0)
        self.idle.append(pid)
        if len(self.idle) > _MOST_IDLE:
            os.kill(self.idle.pop(0), signal.SIGTERM)

    def _send(self, name: str, code: int) -> None:
        os.write(self.socket, f"{name} {code}\n".encode())

    def _report_plan_end(self, pid: int, code: int) -> None:
        """The plan of this supervisor has come to an end."""
        name = self.names.pop(pid)
        del self.pids[name]
        self.kept.discard(name)
        self._send(name, code)

    def _become(self, name: str, names: int, pipe: int) -> NoReturn:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self.socket, self.free, self.ended, self.wake, pipe, *self.pipes.values()):
            if descriptor >= 0:
                os.close(descriptor)
        os.setsid()
        attend(self.folder, name, names, self.done)

    def _collect(self) -> None:
        """Collect the supervisors that have ended. A killed supervisor leaves its children to this process."""
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
        """A supervisor with a plan has ended. Where it ended before it read the plan, start the plan again."""
        name = self.names[pid]
        if name in self.kept and os.path.exists(f"{self.folder}/{name}"):
            self.kept.remove(name)
            del self.names[pid], self.pids[name]
            self._start(name)
            return
        if code:
            self._end_strays()
        self._report_plan_end(pid, code)

    def _end_strays(self) -> None:
        """End what descends from this process and from no supervisor."""
        end(lambda: descendants(os.getpid(), excluded=self.pipes), collect_children=False)

    def end(self) -> NoReturn:
        """End everything below this process, and itself."""
        self.pipes.clear()
        self._end_strays()
        os._exit(0)
