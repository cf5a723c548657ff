"""Starts processes on a node: through Dragon, or by a fork."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from rhapsody_mcp.engine.process.tree import PROCESS_MARK, end, marked, send_signal
from rhapsody_mcp.engine.supervisor import command
from rhapsody_mcp.model.specs import Template

__all__ = [
    "TASK_VARIABLES",
    "DragonLauncher",
    "ForkLauncher",
    "LaunchedProcess",
    "Launcher",
    "MarkedProcess",
    "ProcessGroup",
    "Program",
]

TASK_VARIABLES = "RHAPSODY_TASK_VARIABLES"
"""Environment variable with a JSON object of variables for launched processes; the node agent and Dragon run with other
values of these variables."""


class Program(NamedTuple):
    """A program to start. `env` is added to the inherited variables, and contains PROCESS_MARK."""

    arguments: list[str]
    env: dict[str, str]
    template: Template


class LaunchedProcess(Protocol):
    """A started process, which may have descendants."""

    def join(self) -> int:
        """Wait until the process and its descendants have ended, from any thread. Return its exit code, negative for a
        signal."""

    def terminate(self) -> None:
        """Send TERM to the process. Does nothing if the process has ended."""

    def kill(self) -> None:
        """Kill the process and its descendants at once. Does nothing if they have ended."""


class ProcessGroup(Protocol):
    """The ranks of one job that use a PMI."""

    ranks: list[LaunchedProcess]

    def close(self) -> None:
        """Free the group's resources after its ranks have ended."""


class Launcher(Protocol):
    sets_affinity: bool
    """Whether the supervisor must bind the launched process to CPUs and GPUs, because the launcher does not."""

    def launch(self, program: Program) -> LaunchedProcess:
        """Start a program. Thread-safe."""

    def launch_group(self, programs: Sequence[Program], pmi: str) -> ProcessGroup:
        """Start one program for each rank, in order, under a PMI that works on this node. Thread-safe."""


class ForkLauncher:
    """Starts supervisors through a fork server, which ends with this process. If the fork server ends first, `on_end`
    is called in another thread."""

    sets_affinity = True

    def __init__(self, folder: str, on_end: Callable[[], object]) -> None:
        self._on_end = on_end
        self._socket, server_end = socket.socketpair()
        self._sending = threading.Lock()
        with server_end, open(f"{folder}/fork_server.log", "wb") as log:
            self._server = subprocess.Popen(
                command("fork_server", folder, str(server_end.fileno())),
                env={name: value for name, value in os.environ.items() if "DRAGON" not in name},
                pass_fds=[server_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._server.pid
        self._exit_codes: dict[str, Future[int]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def launch(self, program: Program) -> LaunchedProcess:
        name = os.path.basename(program.arguments[-1])
        code = self._exit_codes[name] = Future[int]()
        self.send("start", name)
        return _ForkedProcess(self, name, code)

    def launch_group(self, programs: Sequence[Program], pmi: str) -> ProcessGroup:
        raise NotImplementedError("a job that needs a PMI is refused when it is submitted")

    def send(self, request: str, name: str) -> None:
        """Send a request to the fork server. Does nothing if the fork server has ended."""
        with suppress(OSError), self._sending:
            self._socket.sendall(f"{request} {name}\n".encode())

    def _listen(self) -> None:
        with suppress(OSError), self._socket.makefile("r") as lines:
            for line in lines:
                name, code = line.split()
                if (exit_code := self._exit_codes.pop(name, None)) is not None:  # `resolve_all` was not there first
                    exit_code.set_result(int(code))
        self._on_end()

    def resolve_all(self) -> None:
        """Have every `join` return with the code of KILL."""
        while self._exit_codes:
            self._exit_codes.popitem()[1].set_result(-signal.SIGKILL)


class _ForkedProcess:
    def __init__(self, launcher: ForkLauncher, name: str, code: Future[int]) -> None:
        self._launcher, self._name, self._code = launcher, name, code

    def join(self) -> int:
        return self._code.result()

    def terminate(self) -> None:
        self._launcher.send(str(int(signal.SIGTERM)), self._name)

    def kill(self) -> None:
        self._launcher.send(str(int(signal.SIGKILL)), self._name)


class MarkedProcess:
    """A process that is found, with its descendants, by the mark in their environment."""

    def __init__(self, mark: str, join: Callable[[], int]) -> None:
        self._mark, self._join = mark, join

    def join(self) -> int:
        code = self._join()
        if code:
            self.kill()
        return code

    def terminate(self) -> None:
        """Send TERM through the kernel, not through Dragon: after a kill through Dragon, Dragon's launcher does not end
        and uses a whole core."""
        send_signal(marked(PROCESS_MARK, self._mark), signal.SIGTERM)

    def kill(self) -> None:
        end(lambda: marked(PROCESS_MARK, self._mark))


class DragonLauncher:
    """Starts Dragon processes with the affinity of their templates.

    Their standard streams are /dev/null. For any other kind of stream, Dragon reads a pipe until it is closed: a
    grandchild that keeps the pipe open would delay every later start on its node.
    """

    sets_affinity = False

    def __init__(self) -> None:
        for package in ("dragon", "dragon.native"):
            _register_empty_package(package)
        with _empty_module("numpy"):
            from dragon.infrastructure.policy import Policy
            from dragon.native.process import Process

        self._process, self._policy = Process, Policy
        self._starting = threading.Lock()

    def launch(self, program: Program) -> LaunchedProcess:
        process = self._process(**self._process_arguments(program))
        with self._starting:
            process.start()
        return MarkedProcess(program.env[PROCESS_MARK], partial(_exit_code, process))

    def hosts(self) -> list[str]:
        """Return the host names of the nodes of Dragon's runtime."""
        from dragon.native.machine import Node, System

        return [Node(node).hostname for node in System().nodes]

    def launch_on(self, host: str, arguments: Sequence[str], env: Mapping[str, str]) -> Any:
        """Start a Dragon process on the node with this host name."""
        process = self._process(
            target=arguments[0],
            args=list(arguments[1:]),
            env=dict(env),
            cwd="/",
            stdout=self._process.DEVNULL,
            stderr=self._process.DEVNULL,
            policy=self._policy(placement=self._policy.Placement.HOST_NAME, host_name=host),
        )
        process.start()
        return process

    def launch_group(self, programs: Sequence[Program], pmi: str) -> ProcessGroup:
        from dragon.infrastructure.facts import PMIBackend
        from dragon.native.process import ProcessTemplate
        from dragon.native.process_group import ProcessGroup

        group = ProcessGroup(restart=False, ignore_error_on_exit=True, pmi=PMIBackend(pmi))
        for program in programs:
            group.add_process(1, ProcessTemplate(**self._process_arguments(program)))
        group.init()
        try:
            group.start()
            # ascending process ids are in the order of the ranks
            puids = sorted({*group.puids, *(puid for puid, _ in group.inactive_puids)})
        except BaseException:
            group.close()
            raise
        return _DragonGroup(
            group,
            [
                MarkedProcess(program.env[PROCESS_MARK], partial(_exit_code, self._process(None, ident=puid)))
                for puid, program in zip(puids, programs, strict=True)
            ],
        )

    def _process_arguments(self, program: Program) -> dict[str, Any]:
        return {
            "target": program.arguments[0],
            "args": program.arguments[1:],
            "env": program.env,
            "cwd": os.getcwd(),
            "stdout": self._process.DEVNULL,
            "stderr": self._process.DEVNULL,
            "policy": self._policy_for(program.template),
        }

    def _policy_for(self, template: Template) -> Any:
        """Return a policy without host_name: the node is always this one, and under a PMI Dragon fails for a name that
        it does not know."""
        return self._policy(
            placement=self._policy.Placement.DEFAULT,
            cpu_affinity=list(template.cpu_affinity),
            gpu_affinity=list(template.gpu_affinity),
        )


def _register_empty_package(package: str) -> None:
    """Register this Dragon package in `sys.modules` without running it, so that an import of its submodules runs only
    these. The package itself imports Batch and the telemetry with a web server, which takes 0.14 s."""
    spec = find_spec(package)
    assert spec is not None, "this process was started by Dragon"
    module = sys.modules.setdefault(package, module_from_spec(spec))
    parent, _, name = package.rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, module)


@contextmanager
def _empty_module(module: str) -> Iterator[None]:
    """Register an empty module of this name during the context. NumPy takes 0.09 s to import, and Dragon needs it only
    for keys that are arrays."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = ModuleType(module)
    try:
        yield
    finally:
        del sys.modules[module]


def _exit_code(process: Any) -> int:
    process.join()
    return int(process.returncode)


class _DragonGroup:
    """A group that has a manager process and a dictionary in Dragon."""

    def __init__(self, group: Any, ranks: list[LaunchedProcess]) -> None:
        self._group, self.ranks = group, ranks

    def close(self) -> None:
        self._group.join()  # wait until the manager knows that the ranks have ended; it would kill them otherwise
        self._group.close()
