"""The two ways to start a process on a node: through Dragon, or by a fork."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
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
"""Holds a JSON object of variables: the node agent and Dragon run with other values, what they launch gets these."""


class Program(NamedTuple):
    """What to start; `env` is added to the variables that are there, and holds PROCESS_MARK."""

    arguments: list[str]
    env: dict[str, str]
    template: Template


class LaunchedProcess(Protocol):
    """A process that was started."""

    def join(self) -> int:
        """Wait until it and all that it started has ended, from any thread; its exit code, negative for a signal."""

    def terminate(self) -> None:
        """Send it TERM; nothing happens where it has ended."""

    def kill(self) -> None:
        """End it and all that it started at once; the same."""


class ProcessGroup(Protocol):
    """The ranks of one job, which find each other through a PMI."""

    ranks: list[LaunchedProcess]

    def close(self) -> None:
        """Free what the job had besides its ranks, which have ended."""


class Launcher(Protocol):
    sets_affinity: bool
    """Whether a launched process has to bind itself to CPUs and GPUs."""

    def launch(self, program: Program) -> LaunchedProcess:
        """Start a program; from any thread."""

    def launch_group(self, programs: Sequence[Program], pmi: str) -> ProcessGroup:
        """Start one program a rank, in order, under a PMI that works here; from any thread."""


class ForkLauncher:
    """Has supervisors forked by a fork server, which ends with this process. `on_end` is called, in a thread, where the
    fork server ends first."""

    sets_affinity = True

    def __init__(self, folder: str, on_end: Callable[[], object]) -> None:
        self._on_end = on_end
        self._socket, theirs = socket.socketpair()
        self._sending = threading.Lock()
        with theirs, open(f"{folder}/fork_server.log", "wb") as log:
            self._child = subprocess.Popen(
                command("fork_server", folder, str(theirs.fileno())),
                env={name: value for name, value in os.environ.items() if "DRAGON" not in name},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._child.pid
        self._codes: dict[str, Future[int]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def launch(self, program: Program) -> LaunchedProcess:
        name = os.path.basename(program.arguments[-1])
        code = self._codes[name] = Future[int]()
        self.send("start", name)
        return _Forked(self, name, code)

    def launch_group(self, programs: Sequence[Program], pmi: str) -> ProcessGroup:
        raise NotImplementedError("a job that needs a PMI is refused when it is submitted")

    def send(self, request: str, name: str) -> None:
        """Nothing happens where the process that forks has ended, which `on_end` is called for."""
        with suppress(OSError), self._sending:
            self._socket.sendall(f"{request} {name}\n".encode())

    def _listen(self) -> None:
        with suppress(OSError), self._socket.makefile("r") as lines:
            for line in lines:
                name, code = line.split()
                self._codes.pop(name).set_result(int(code))
        self._on_end()

    def give_up(self) -> None:
        """Let nobody wait for a launched process any longer."""
        while self._codes:
            self._codes.popitem()[1].set_result(-signal.SIGKILL)


class _Forked:
    def __init__(self, launcher: ForkLauncher, name: str, code: Future[int]) -> None:
        self._launcher, self._name, self._code = launcher, name, code

    def join(self) -> int:
        return self._code.result()

    def terminate(self) -> None:
        self._launcher.send(str(int(signal.SIGTERM)), self._name)

    def kill(self) -> None:
        self._launcher.send(str(int(signal.SIGKILL)), self._name)


class MarkedProcess:
    """A process that is known by its mark, as all that it starts is."""

    def __init__(self, mark: str, join: Callable[[], int]) -> None:
        self._mark, self._join = mark, join

    def join(self) -> int:
        code = self._join()
        if code:
            self.kill()
        return code

    def terminate(self) -> None:
        """By the kernel, not by Dragon: after a Dragon kill its launcher spins at the end and never ends."""
        send_signal(marked(PROCESS_MARK, self._mark), signal.SIGTERM)

    def kill(self) -> None:
        end(lambda: marked(PROCESS_MARK, self._mark))


class DragonLauncher:
    """Starts Dragon processes, where Dragon's policies say.

    Their standard streams are /dev/null: Dragon reads a pipe for each other kind, and a grandchild that keeps
    such a pipe open holds up every later start on its node.
    """

    sets_affinity = False

    def __init__(self) -> None:
        for package in ("dragon", "dragon.native"):
            _leave_empty(package)
        with _without("numpy"):
            from dragon.infrastructure.policy import Policy
            from dragon.native.process import Process

        self._process, self._policy = Process, Policy
        self._starting = threading.Lock()

    def launch(self, program: Program) -> LaunchedProcess:
        process = self._process(**self._start_of(program))
        with self._starting:
            process.start()
        return MarkedProcess(program.env[PROCESS_MARK], partial(_code_of, process))

    def launch_group(self, programs: Sequence[Program], pmi: str) -> ProcessGroup:
        from dragon.infrastructure.facts import PMIBackend
        from dragon.native.process import ProcessTemplate
        from dragon.native.process_group import ProcessGroup

        group = ProcessGroup(restart=False, ignore_error_on_exit=True, pmi=PMIBackend(pmi))
        for program in programs:
            group.add_process(1, ProcessTemplate(**self._start_of(program)))
        group.init()
        try:
            group.start()
            # ascending ids are the order of the ranks
            ids = sorted({*group.puids, *(puid for puid, _ in group.inactive_puids)})
        except BaseException:
            group.close()
            raise
        return _DragonGroup(
            group,
            [
                MarkedProcess(program.env[PROCESS_MARK], partial(_code_of, self._process(None, ident=puid)))
                for puid, program in zip(ids, programs, strict=True)
            ],
        )

    def _start_of(self, program: Program) -> dict[str, Any]:
        return {
            "target": program.arguments[0],
            "args": program.arguments[1:],
            "env": program.env,
            "cwd": os.getcwd(),
            "stdout": self._process.DEVNULL,
            "stderr": self._process.DEVNULL,
            "policy": self._policy_of(program.template),
        }

    def _policy_of(self, template: Template) -> Any:
        """Without the host_name, which is this node's: under a PMI Dragon breaks where it does not know the name."""
        return self._policy(
            placement=self._policy.Placement.DEFAULT,
            cpu_affinity=list(template.cpu_affinity),
            gpu_affinity=list(template.gpu_affinity),
        )


def _leave_empty(package: str) -> None:
    """Have an import of a part of this package of Dragon import that part alone: Dragon itself imports its Batch and
    its telemetry, with a web server, which takes 0.14 s."""
    spec = find_spec(package)
    assert spec is not None, "this process was started by Dragon"
    module = sys.modules.setdefault(package, module_from_spec(spec))
    parent, _, name = package.rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, module)


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Have what is imported meanwhile find an empty module of this name. NumPy takes 0.09 s, and Dragon imports it for
    keys that are arrays."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = ModuleType(module)
    try:
        yield
    finally:
        del sys.modules[module]


def _code_of(process: Any) -> int:
    process.join()
    return int(process.returncode)


class _DragonGroup:
    """Has a manager process and a dictionary in Dragon besides its ranks."""

    def __init__(self, group: Any, ranks: list[LaunchedProcess]) -> None:
        self._group, self.ranks = group, ranks

    def close(self) -> None:
        self._group.join()  # until it knows that they have ended: else it kills them, through Dragon
        self._group.close()
