"""The process that an engine places: it runs a program as its child and owns the tree below that.

    python -I -S -c COMMAND PLAN

TERM ends the child's whole tree, politely first, then with KILL; the end of the keeper ends it at once. When this
process has ended nothing that it started is left, and the file PLAN.outcome says how the child ended.

One stands over every task that has processes of its own, and over every worker. So it knows nothing of tasks, and
imports next to nothing: it takes a fifth of the time that one took which imported what tasks are made of.
"""

from __future__ import annotations

import _thread
import marshal
import os
import sys
import time

from rhapsody_mcp.engine.printing import STREAMS, keep_small, open_output
from rhapsody_mcp.engine.processes import (
    adopt_orphans,
    end,
    open_lifeline,
    outlives,
    own_descendants,
    reap,
    send_signal,
)
from rhapsody_mcp.engine.starts import FOLDER_GONE, NOT_NOTED, NOT_STARTED, note_start

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping
    from types import FrameType
    from typing import Any, NoReturn
else:
    import _signal as signal

__all__ = [
    "GRACE_S",
    "OWNER_GONE",
    "Impossible",
    "command",
    "execute",
    "find_program",
    "finish",
    "leave",
    "main",
    "supervise",
]

GRACE_S = 2
"""From TERM to KILL."""
OWNER_GONE = 86
"""The exit code of a supervisor whose keeper has ended."""
_ABOUT_TO_END_S = 0.1
_CANNOT_RUN = 126  # what shells use for it
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def command(module: str, *arguments: str) -> list[str]:
    """What runs the main function of a module of this package in a Python that imports nothing else."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    boot = f"import sys; sys.path.append({root!r}); from rhapsody_mcp.engine.{module} import main; main()"
    return [sys.executable, "-I", "-S", "-c", boot, *arguments]


def main() -> NoReturn:
    supervise(sys.argv[1])


def supervise(path: str) -> NoReturn:
    """Be the supervisor of the plan in this file."""
    with open(path, "rb") as file:
        plan = marshal.load(file)
    os.unlink(path)
    adopt_orphans()
    os._exit(_Supervisor(plan, path).run())


class Impossible(Exception):
    """Raised with the reason where the child cannot be started here."""


class _Supervisor:
    def __init__(self, plan: Mapping[str, Any], path: str) -> None:
        self.plan, self.path = plan, path
        self.files: list[int] = []
        self.pid = 0
        self.started = 0.0

    def run(self) -> int:
        """Its exit code: a worker's is its child's."""
        try:
            env, cwd = self._environment(), self._folder()
            if self.plan["cpus"]:
                os.sched_setaffinity(0, self.plan["cpus"])
            self.files = [open_output(f"{self.path}.{suffix}") for suffix in STREAMS]
            program = find_program(self.plan["arguments"][0], env, cwd)
        except (Impossible, OSError) as error:
            return self._leave("invalid", str(error))
        if self.plan["note"] is None:
            for suffix in STREAMS:
                os.unlink(f"{self.path}.{suffix}")
            code, _ = _watch(lambda: self._become(program, env, cwd), self._began)
            return code if code >= 0 else 128 - code
        try:
            note_start(*self.plan["note"])
        except OSError as error:
            return self._leave("lost", NOT_NOTED.format(error))
        try:
            code, left_running = _watch(lambda: self._become(program, env, cwd), self._began)
        except OSError as error:
            return self._leave("lost", NOT_STARTED.format(error.strerror))
        return self._leave(*self._refused(), code=code, left_running=left_running)

    def _environment(self) -> dict[str, str]:
        env = {**os.environ}
        for name, value in self.plan["env"].items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    def _folder(self) -> str:
        """Where it runs; a relative cwd begins in the folder of its session."""
        given: str = self.plan["cwd"]
        session: str = self.plan["folder"]
        if not os.path.isdir(session) and not os.path.isabs(given):
            raise Impossible(FOLDER_GONE.format(session))
        cwd = os.path.join(session, given)
        if not os.path.isdir(cwd):
            there = f", which is {cwd} here," if cwd != given else ""
            raise Impossible(f"cwd {given!r}{there} is not a folder on {_here()}.")
        return cwd

    def _become(self, program: str, env: dict[str, str], cwd: str) -> NoReturn:
        for descriptor, opened in zip((1, 2), self.files, strict=True):
            os.dup2(opened, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(cwd)
        if error := execute(program, self.plan["arguments"], env):
            with open(f"{self.path}.refused", "w") as file:
                file.write(error)
        os._exit(_CANNOT_RUN)

    def _refused(self) -> tuple[str, str]:
        """Why the kernel did not run the program; nothing where it did."""
        try:
            with open(f"{self.path}.refused") as file:
                return "invalid", file.read()
        except FileNotFoundError:
            return "", ""

    def _began(self, pid: int) -> None:
        self.pid, self.started = pid, time.time()
        _write_whole(f"{self.path}.pids", f"{os.getpid()} {pid if self.plan['note'] is None else ''}".encode())
        if (most := self.plan["output_bytes"]) is not None:
            _thread.start_new_thread(keep_small, (self.files, most))
        if self.plan["started"]:
            _tell(self.plan["started"], f"{self.plan['note'][1]} {self.started}".encode())

    def _leave(self, problem: str, words: str, code: int | None = None, left_running: int = 0) -> int:
        return 0 if leave(self.path, problem, words, self.pid, code, self.started, left_running) else 1


def leave(
    path: str,
    problem: str,
    words: str,
    pid: int = 0,
    code: int | None = None,
    started: float = 0.0,
    left_running: int = 0,
) -> bool:
    """Write down how a program ended, or the `problem` that kept it from its start; False where that cannot be."""
    ended = (problem, words, pid, code, started, time.time(), left_running)
    return _write_whole(f"{path}.outcome", marshal.dumps(ended))


def _write_whole(path: str, data: bytes) -> bool:
    """A file that appears whole or not at all."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            file.write(data)
        os.rename(f"{path}.tmp", path)
    except OSError:
        return False
    return True


def _tell(address: str, news: bytes) -> None:
    import _socket

    try:
        _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM).sendto(news, address)
    except OSError:
        return


def _here() -> str:
    return os.uname().nodename


# --- programs


def find_program(name: str, env: Mapping[str, str], cwd: str) -> str:
    """The program's path; raises an error in words where there is none that can be run."""
    if os.sep in name:
        path = os.path.join(cwd, name)
        if not os.path.exists(path):
            raise Impossible(f"executable {name!r} does not exist on {_here()}.")
    else:
        folders = env.get("PATH", os.defpath).split(os.pathsep)
        paths = [os.path.join(cwd, folder, name) for folder in folders]
        found = next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)
        if found is None:
            raise Impossible(f"no program {name!r} on PATH of {_here()}; give its full path.")
        path = found
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        raise Impossible(f"{path!r} is not a program that can be run; is it executable (chmod +x)?")
    return path


def execute(program: str, arguments: list[str], env: Mapping[str, str]) -> str:
    """Become that program, with the signals as a shell leaves them; returns why that could not be."""
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, arguments, env)
    except OSError as error:
        return f"{program} cannot be run: {error.strerror}."
    except ValueError:
        return "an argument holds a NUL character, which no program can get."


# --- the tree


def _watch(child: Callable[[], NoReturn], began: Callable[[int], None]) -> tuple[int, int]:
    """Run `child` in a forked process that leads a session of its own, until it and all its descendants have
    ended; its exit code, negative for a signal, and how many processes it left running."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        finish(child)
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGALRM, _kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    began(pid)
    if not outlives(pid, open_lifeline()):
        end(own_descendants)
        os._exit(OWNER_GONE)
    _, status = os.waitpid(pid, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(0)
    left_running = _left_running()
    end(own_descendants)
    return os.waitstatus_to_exitcode(status), left_running


def _left_running() -> int:
    """How many processes the child left that are not about to end by themselves."""
    deadline = time.monotonic() + _ABOUT_TO_END_S
    while (count := len(own_descendants())) and time.monotonic() < deadline:
        reap()
        time.sleep(0.005)
    return count


def finish(child: Callable[[], NoReturn]) -> NoReturn:
    """Run that in a process that was forked for it."""
    try:
        child()
    except BaseException:  # nothing of the parent's may run in the child
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    send_signal(own_descendants(), signal.SIGTERM)
    signal.alarm(GRACE_S)


def _kill(_number: int, _frame: FrameType | None) -> None:
    send_signal(own_descendants(), signal.SIGKILL)
