"""The fork server of a host: a supervisor that it forks takes a millisecond, one that is a new Python fifteen.

    python -I -S -c COMMAND FOLDER SOCKET

It takes lines from the socket, `fork NAME` for the plan FOLDER/NAME and `SIGNAL NAME` for its supervisor, and writes
`NAME CODE` when that and all that it started has ended. It ends at end-of-file, with everything below it.
"""

from __future__ import annotations

import os
import select
import sys

from rhapsody_mcp.engine.processes import adopt_orphans, descendants, end
from rhapsody_mcp.engine.starts import NOT_STARTED
from rhapsody_mcp.engine.supervisor import finish, leave, supervise

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal

__all__ = ["main"]


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
        self.names: dict[int, str] = {}
        self.pids: dict[str, int] = {}
        self.ended, self.wake = os.pipe()
        os.set_blocking(self.ended, False)
        os.set_blocking(self.wake, False)

    def serve(self) -> None:
        """Returns, or raises OSError, when the host has ended."""
        signal.set_wakeup_fd(self.wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        rest = b""
        while True:
            readable, _, _ = select.select([self.socket, self.ended], [], [])
            if self.ended in readable:
                os.read(self.ended, 4096)
                self._collect()
            if self.socket in readable:
                data = os.read(self.socket, 1 << 16)
                if not data:
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    order, _, name = line.decode().partition(" ")
                    self._obey(order, name)

    def _obey(self, order: str, name: str) -> None:
        if order == "fork":
            self._fork(name)
        elif name in self.pids:
            os.kill(self.pids[name], int(order))

    def _fork(self, name: str) -> None:
        try:
            pid = os.fork()
        except OSError as error:  # no process more than these
            leave(f"{self.folder}/{name}", "lost", NOT_STARTED.format(error.strerror))
            self._say(name, 1)
            return
        if pid == 0:
            finish(lambda: self._become(name))
        self.names[pid], self.pids[name] = name, pid

    def _say(self, name: str, code: int) -> None:
        os.write(self.socket, f"{name} {code}\n".encode())

    def _become(self, name: str) -> NoReturn:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self.socket, self.ended, self.wake):
            os.close(descriptor)
        os.setsid()
        supervise(f"{self.folder}/{name}")

    def _collect(self) -> None:
        """Tell of the supervisors that have ended. One that was killed leaves its children to this process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if (name := self.names.pop(pid, None)) is not None:
                del self.pids[name]
                code = os.waitstatus_to_exitcode(status)
                if code:
                    self._end_strays()
                self._say(name, code)

    def _end_strays(self) -> None:
        """End what descends from this process and from no supervisor."""
        end(lambda: descendants(os.getpid(), but=self.names), collects=False)

    def end(self) -> NoReturn:
        """End everything below this process, and itself."""
        self.names.clear()
        self._end_strays()
        os._exit(0)
