"""The process that a node agent launches: it runs a program as its child and owns the tree below that.

    python -I -S -c COMMAND PLAN

TERM ends the child's whole tree, politely first, then with KILL; the end of the keeper ends it at once. When this
process has ended nothing that it started is left, and the file PLAN.outcome says how the child ended.

One stands over every task that has processes of its own, and over every worker. So it knows nothing of tasks, and
imports next to nothing: with the modules of tasks the start would take five times as long.
"""

from __future__ import annotations

import _socket
import errno
import marshal
import os
import sys
import time

from rhapsody_mcp.engine.process.tree import (
    adopt_orphans,
    child_ends_first,
    end,
    open_lifeline,
    own_descendants,
    reap,
    send_signal,
)
from rhapsody_mcp.engine.task.output_files import MOVE_COUNT, STREAMS, Output, shared_count
from rhapsody_mcp.engine.task.start_log import FOLDER_GONE, NOT_STARTED, START_NOT_LOGGED, log_start

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
    "attend",
    "command",
    "execute",
    "find_program",
    "finish",
    "main",
    "write_outcome",
]

GRACE_S = 2
"""From TERM to KILL."""
OWNER_GONE = 86
"""The exit code of a supervisor whose keeper has ended."""
_ABOUT_TO_END_S = 0.1
_INHERITED = {**os.environ}
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def command(module: str, *arguments: str) -> list[str]:
    """What runs the main function of a module of this package in a Python that imports nothing else."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    boot = f"import sys; sys.path.append({root!r}); from rhapsody_mcp.engine.{module} import main; main()"
    return [sys.executable, "-I", "-S", "-c", boot, *arguments]


def main() -> NoReturn:
    adopt_orphans()
    os._exit(_Supervisor(sys.argv[1], open_lifeline()).run())


def attend(folder: str, name: str, names: int, done: int) -> NoReturn:
    """Run the plan `name` of a folder, and then each plan whose name comes through the pipe `names` (-1: none). After
    each plan that ends well, write the number of this process to the pipe `done`. A plan that fails ends this process.
    """
    adopt_orphans()
    lifeline, number = open_lifeline(), f"{os.getpid()}\n".encode()
    while name:
        supervisor = _Supervisor(f"{folder}/{name}", lifeline)
        code = supervisor.run()
        if code or names < 0:
            os._exit(code)
        supervisor.reset()
        os.write(done, number)
        name = os.read(names, 4096).decode()
    os._exit(0)


class Impossible(Exception):
    """Raised with the reason where the child cannot be started here."""


class _Supervisor:
    def __init__(self, path: str, lifeline: int) -> None:
        """Of the plan in the file at `path`."""
        self.path, self.lifeline = path, lifeline
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.plan: Mapping[str, Any] = marshal.loads(os.read(file, os.fstat(file).st_size))
        os.close(file)
        os.unlink(path)
        self.outputs: list[Output] = []
        self.usable = os.sched_getaffinity(0) if self.plan["cpus"] else set()
        self.pid = 0
        self.started = 0.0

    def run(self) -> int:
        """Run the plan; the exit code, which for a worker is that of the worker."""
        try:
            cwd = self._enter()
            env = self._environment(cwd)
            if self.plan["cpus"]:
                os.sched_setaffinity(0, self.plan["cpus"])
            moves = [0] if self.plan["note"] else shared_count(f"{self.path}.{MOVE_COUNT}")
            for suffix in STREAMS:
                self.outputs.append(Output(f"{self.path}.{suffix}", self.plan["output_bytes"], moves))
            program = find_program(self.plan["arguments"][0], env, cwd)
        except (Impossible, OSError) as error:
            return self._write_outcome("invalid", str(error))
        if self.plan["note"] is None:
            self._report(f"{os.getpid()}")  # before the worker runs tasks: from now on the host sees a supervisor stop
            code, _ = self._watch(program, env)
            return code if code >= 0 else 128 - code
        try:
            log_start(*self.plan["note"])
        except OSError as error:
            return self._write_outcome("lost", START_NOT_LOGGED.format(error))
        try:
            code, left_running = self._watch(program, env)
        except Impossible as error:
            return self._write_outcome("invalid", str(error))
        except OSError as error:
            return self._write_outcome("lost", NOT_STARTED.format(error.strerror))
        return self._write_outcome("", "", code, left_running)

    def reset(self) -> None:
        """Put signals, output, CPUs and working directory back for the next plan."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for output in self.outputs:
            output.close()
        if self.usable:
            os.sched_setaffinity(0, self.usable)
        os.chdir("/")

    def _environment(self, cwd: str) -> dict[str, str]:
        env = {**_INHERITED, "PWD": cwd}
        for name, value in self.plan["env"].items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    def _enter(self) -> str:
        """Go where it runs; a relative cwd begins in the folder of its session."""
        plan_cwd: str = self.plan["cwd"]
        session: str = self.plan["folder"]
        cwd = os.path.join(session, plan_cwd) if plan_cwd else session
        try:
            os.chdir(cwd)
        except OSError as error:
            if not os.path.isabs(plan_cwd) and not os.path.isdir(session):
                raise Impossible(FOLDER_GONE.format(session)) from None
            there = f", which is {cwd} here," if cwd != plan_cwd else ""
            wrong = f"cannot be entered ({error.strerror})" if os.path.isdir(cwd) else "is not a folder"
            raise Impossible(f"cwd {plan_cwd!r}{there} {wrong} on {_here()}.") from None
        return cwd

    def _watch(self, program: str, env: dict[str, str]) -> tuple[int, int]:
        """Run the program until it and all its descendants have ended: its exit code, negative for a signal, and how
        many processes it left running. TERM ends it, and afterwards this process."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            pid = self._spawn(program, env, mask)
            signal.signal(signal.SIGTERM, _terminate)
            signal.signal(signal.SIGALRM, _kill)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._began(pid)
        if not child_ends_first(pid, self.lifeline, self.outputs):
            end(own_descendants)
            os._exit(OWNER_GONE)
        _, status = os.waitpid(pid, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(0)
        left_running = self._left_running()
        end(own_descendants)
        reap()
        self._drain()
        return os.waitstatus_to_exitcode(status), left_running

    def _spawn(self, program: str, env: dict[str, str], mask: set[int]) -> int:
        """Not by a fork, which copies this process to throw the copy away: that takes longer than many a program."""
        out, err = (output.writer for output in self.outputs)
        try:
            return os.posix_spawn(
                program,
                self.plan["arguments"],
                env,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, out, 1),
                    (os.POSIX_SPAWN_DUP2, err, 2),
                ],
                setsid=True,
                setsigmask=mask,
                setsigdef=_IGNORED_BY_PYTHON,
            )
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):  # no process more
                raise
            raise Impossible(_why_not(program, error)) from None

    def _began(self, pid: int) -> None:
        self.pid, self.started = pid, time.time()
        for output in self.outputs:
            output.close_writer()
        if note := self.plan["note"]:
            self._report(f"{os.getpid()}", note[1])
        else:
            self._report(f"{os.getpid()},{pid}")

    def _report(self, watched: str, uid: str = "") -> None:
        """Tell the host which processes must not stand still, and that the task of this uid, if any, has started."""
        _send_event(self.plan["started"], f"{os.path.basename(self.path)} {watched} {self.started} {uid}".encode())

    def _left_running(self) -> int:
        """How many processes the child left that are not about to end by themselves."""
        deadline = time.monotonic() + _ABOUT_TO_END_S
        while (count := len(own_descendants())) and time.monotonic() < deadline:
            self._drain()
            reap()
            time.sleep(0.005)
        return count

    def _drain(self) -> None:
        for output in self.outputs:
            output.drain()

    def _write_outcome(self, problem: str, message: str, code: int | None = None, left_running: int = 0) -> int:
        return 0 if write_outcome(self.path, problem, message, self.pid, code, self.started, left_running) else 1


def write_outcome(
    path: str,
    problem: str,
    message: str,
    pid: int = 0,
    code: int | None = None,
    started: float = 0.0,
    left_running: int = 0,
) -> bool:
    """Write down how a program ended, or the `problem` that kept it from its start; False where that cannot be."""
    ended = (problem, message, pid, code, started, time.time(), left_running)
    data = marshal.dumps(ended)
    try:
        file = os.open(f"{path}.outcome", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            return os.write(file, data) == len(data)
        finally:
            os.close(file)
    except OSError:
        return False


def _send_event(address: str, event: bytes) -> None:
    sender = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM)
    try:
        sender.sendto(event, address)
    except OSError:
        return
    finally:
        sender.close()


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
        found = next((path for path in paths if os.access(path, os.X_OK) and os.path.isfile(path)), None)
        if found is None:
            raise Impossible(f"no program {name!r} on PATH of {_here()}; give its full path.")
        return found
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        raise Impossible(f"{path!r} is not a program that can be run; is it executable (chmod +x)?")
    return path


def execute(program: str, arguments: list[str], env: Mapping[str, str]) -> str:
    """Become that program, with the signals as a shell leaves them; returns why that could not be."""
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, arguments, env)
    except (OSError, ValueError) as error:
        return _why_not(program, error)


def _why_not(program: str, error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "an argument holds a NUL character, which no program can get."
    return f"{program} cannot be run: {error.strerror}."


# --- the tree


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
