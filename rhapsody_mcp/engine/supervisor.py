"""The process that a node agent launches: it runs a program as its child, and ends the child's descendants.

    python -I -S -c COMMAND PLAN

TERM ends the descendants: they get TERM, and KILL after the grace period. If the keeper ends, they get KILL at once.
When this process has ended, no descendant is left, and the file PLAN.outcome says how the program ended.

Each process of a task and each worker has a supervisor. Therefore this module imports very little: with the modules
that run tasks, its start would take five times as long.
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
from rhapsody_mcp.engine.task.output_files import MOVE_COUNT, STREAMS, Output, make_room, shared_count
from rhapsody_mcp.engine.task.start_log import FOLDER_GONE, NOT_STARTED, START_NOT_LOGGED, log_start, place_of

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
    "STARTED",
    "CannotStart",
    "command",
    "exec_program",
    "find_program",
    "main",
    "run_forked_child",
    "run_plans",
    "write_outcome",
]

GRACE_S = 2
"""Seconds from TERM to KILL."""
OWNER_GONE = 86
"""The exit code of a supervisor whose keeper has ended."""
STARTED = ".started"
"""The suffix of the FIFO beside a plan. A supervisor that a step of the scheduler starts holds it open while it lives.
"""
_END_WAIT_S = 0.1
_INHERITED_ENV = {**os.environ}
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs the main function of a module of this package in a Python without site-packages."""
    boot = f"import sys; sys.path.append({_ROOT!r}); from rhapsody_mcp.engine.{module} import main; main()"
    return [sys.executable, "-I", "-S", "-c", boot, *arguments]


def main() -> NoReturn:
    adopt_orphans()
    _show_life(sys.argv[1])
    os._exit(_Supervisor(sys.argv[1], open_lifeline()).run())


def _show_life(path: str) -> None:
    """Hold the FIFO of the plan open, where there is one, until this process ends: nobody is its parent who waits."""
    try:
        os.open(path + STARTED, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return


def run_plans(folder: str, name: str, name_pipe: int, idle_pipe: int) -> NoReturn:
    """Run the plan `name` of a folder, then each plan whose name arrives in the pipe `name_pipe` (-1: no more plans).
    After each successful plan, write the process id of this process to `idle_pipe`. A plan that fails ends this
    process."""
    adopt_orphans()
    lifeline, pid_line = open_lifeline(), f"{os.getpid()}\n".encode()
    while name:
        supervisor = _Supervisor(f"{folder}/{name}", lifeline)
        code = supervisor.run()
        if code or name_pipe < 0:
            os._exit(code)
        supervisor.reset()
        os.write(idle_pipe, pid_line)
        name = os.read(name_pipe, 4096).decode()
    os._exit(0)


class CannotStart(Exception):
    """Raised with the reason if the program cannot be started on this node."""


class _Supervisor:
    def __init__(self, path: str, lifeline: int) -> None:
        """Read the plan in the file `path`, and delete the file."""
        self.path, self.lifeline = path, lifeline
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.plan: Mapping[str, Any] = marshal.loads(os.read(file, os.fstat(file).st_size))
        os.close(file)
        os.unlink(path)
        self.outputs: list[Output] = []
        self.usable_cpus = os.sched_getaffinity(0) if self.plan["cpus"] else set()
        self.pid = 0
        self.started = 0.0
        self.used = (0.0, 0)
        """CPU seconds and the most memory of one process in bytes, once the program has ended."""

    def run(self) -> int:
        """Run the plan, and return an exit code: for a worker, the code of the worker; for a task, 0 if the outcome was
        written."""
        try:
            cwd = self._change_directory()
            env = self._environment(cwd)
            if self.plan["cpus"]:
                os.sched_setaffinity(0, self.plan["cpus"])
            move_counter = [0] if self.plan["start_log_entry"] else shared_count(f"{self.path}.{MOVE_COUNT}")
            for suffix in STREAMS:
                self.outputs.append(Output(f"{self.path}.{suffix}", self.plan["output_bytes"], move_counter))
            program = find_program(self.plan["arguments"][0], env, cwd)
        except (CannotStart, OSError) as error:
            return self._write_outcome("invalid", str(error))
        if self.plan["start_log_entry"] is None:
            # before the worker runs tasks: from now on, the node agent notices a stopped supervisor
            self._report(f"{os.getpid()}")
            code, _ = self._watch(program, env)
            return code if code >= 0 else 128 - code
        try:
            folder, uid, attempt = self.plan["start_log_entry"]
            log_start(folder, uid, attempt, place_of(self.path))
        except OSError as error:
            return self._write_outcome("lost", START_NOT_LOGGED.format(error))
        try:
            code, left_running = self._watch(program, env)
        except CannotStart as error:
            return self._write_outcome("invalid", str(error))
        except OSError as error:
            return self._write_outcome("lost", NOT_STARTED.format(error.strerror))
        return self._write_outcome("", "", code, left_running)

    def reset(self) -> None:
        """Restore signals, output, CPUs and working directory for the next plan."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for output in self.outputs:
            output.close()
        if self.usable_cpus:
            os.sched_setaffinity(0, self.usable_cpus)
        os.chdir("/")

    def _environment(self, cwd: str) -> dict[str, str]:
        env = {**_INHERITED_ENV, "PWD": cwd}
        for name, value in self.plan["env"].items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        return env

    def _change_directory(self) -> str:
        """Change to the plan's working directory, and return its path. A relative path starts in the session folder."""
        plan_cwd: str = self.plan["cwd"]
        session: str = self.plan["folder"]
        cwd = os.path.join(session, plan_cwd) if plan_cwd else session
        try:
            os.chdir(cwd)
        except OSError as error:
            if not os.path.isabs(plan_cwd) and not os.path.isdir(session):
                raise CannotStart(FOLDER_GONE.format(session)) from None
            resolved_text = f", which is {cwd} here," if cwd != plan_cwd else ""
            problem_text = f"cannot be entered ({error.strerror})" if os.path.isdir(cwd) else "is not a folder"
            raise CannotStart(f"cwd {plan_cwd!r}{resolved_text} {problem_text} on {_node_name()}.") from None
        return cwd

    def _watch(self, program: str, env: dict[str, str]) -> tuple[int, int]:
        """Run the program until it and its descendants have ended. Return its exit code, negative for a signal, and the
        number of descendants that were still running. TERM ends the program, and then this process."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            pid = self._spawn(program, env, mask)
            signal.signal(signal.SIGTERM, _terminate)
            signal.signal(signal.SIGALRM, _kill)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._report_start(pid)
        if not child_ends_first(pid, self.lifeline, self.outputs):
            end(own_descendants)
            os._exit(OWNER_GONE)
        _, status, used = os.wait4(pid, 0)
        self.used = used.ru_utime + used.ru_stime, used.ru_maxrss * _MAXRSS_BYTES
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.alarm(0)
        left_running = self._count_left_running()
        end(own_descendants)
        reap()
        self._drain()
        return os.waitstatus_to_exitcode(status), left_running

    def _spawn(self, program: str, env: dict[str, str], mask: set[int]) -> int:
        """Start the program with posix_spawn: a fork would first copy this process, which takes longer than many
        programs run."""
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
            # errors of a reached limit, which are not errors of the program
            if isinstance(error, OSError) and error.errno in (errno.EAGAIN, errno.ENOMEM):
                raise
            raise CannotStart(_exec_error(program, error)) from None

    def _report_start(self, pid: int) -> None:
        self.pid, self.started = pid, time.time()
        for output in self.outputs:
            output.close_writer()
        if note := self.plan["start_log_entry"]:
            self._report(f"{os.getpid()}", note[1])
        else:
            self._report(f"{os.getpid()},{pid}")

    def _report(self, pids: str, uid: str = "") -> None:
        """Send the node agent the processes that it must watch, and the uid of the task that has started, if any."""
        _send_event(self.plan["start_events"], f"{os.path.basename(self.path)} {pids} {self.started} {uid}".encode())

    def _count_left_running(self) -> int:
        """Return how many descendants of the ended program still run after a short wait."""
        deadline = time.monotonic() + _END_WAIT_S
        while (count := len(own_descendants())) and time.monotonic() < deadline:
            self._drain()
            reap()
            time.sleep(0.005)
        return count

    def _drain(self) -> None:
        for output in self.outputs:
            output.drain()

    def _write_outcome(self, problem: str, message: str, code: int | None = None, left_running: int = 0) -> int:
        run = (self.pid, code, self.started, left_running, *self.used)
        if any(output.has_unnoted_loss for output in self.outputs):
            make_room(self.outputs)
        if write_outcome(self.path, problem, message, *run):
            return 0
        make_room(self.outputs)  # the disk is full, perhaps of what the program has printed
        return 0 if write_outcome(self.path, problem, message, *run) else 1


def write_outcome(
    path: str,
    problem: str,
    message: str,
    pid: int = 0,
    code: int | None = None,
    started: float = 0.0,
    left_running: int = 0,
    cpu_s: float = 0.0,
    peak_memory_bytes: int = 0,
) -> bool:
    """Write how a program ended, or the `problem` that prevented its start; return False if that fails."""
    fields = (problem, message, pid, code, started, time.time(), left_running, cpu_s, peak_memory_bytes)
    data = marshal.dumps(fields)
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


def _node_name() -> str:
    return os.uname().nodename


# --- programs


def find_program(name: str, env: Mapping[str, str], cwd: str) -> str:
    """Return the path of the program. Raises CannotStart if there is no such program, or if it is not executable."""
    if os.sep in name:
        path = os.path.join(cwd, name)
        if not os.path.exists(path):
            raise CannotStart(f"executable {name!r} does not exist on {_node_name()}.")
    else:
        folders = env.get("PATH", os.defpath).split(os.pathsep)
        paths = [os.path.join(cwd, folder, name) for folder in folders]
        found_path = next((path for path in paths if os.access(path, os.X_OK) and os.path.isfile(path)), None)
        if found_path is None:
            raise CannotStart(f"no program {name!r} on PATH of {_node_name()}; give its full path.")
        return found_path
    if os.path.isdir(path) or not os.access(path, os.X_OK):
        raise CannotStart(f"{path!r} is not a program that can be run; is it executable (chmod +x)?")
    return path


def exec_program(program: str, arguments: list[str], env: Mapping[str, str]) -> str:
    """Replace this process by the program, with the signal handling that a shell provides. Returns only if that fails,
    with the reason."""
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(program, arguments, env)
    except (OSError, ValueError) as error:
        return _exec_error(program, error)


def _exec_error(program: str, error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "an argument holds a NUL character, which no program can get."
    return f"{program} cannot be run: {error.strerror}."


# --- the tree


def run_forked_child(child: Callable[[], NoReturn]) -> NoReturn:
    """Run `child` in a forked process, and end the process."""
    try:
        child()
    except BaseException:  # the parent's code must not continue in the child
        sys.excepthook(*sys.exc_info())
    os._exit(1)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    send_signal(own_descendants(), signal.SIGTERM)
    signal.alarm(GRACE_S)


def _kill(_number: int, _frame: FrameType | None) -> None:
    send_signal(own_descendants(), signal.SIGKILL)
