"""What a function finds does not depend on what ran before it in the same worker, and what it prints is its own."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from rhapsody_mcp.api import ComputeTask, ForEach, Module, Session, Source, TaskState
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from tests.processes import wait_until

pytestmark = pytest.mark.anyio
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as of a program's own functions, in __main__

OWN: dict[str, Any] = {"process_template": {}}
MODES = {"worker": {}, "process": OWN}
in_both_modes = pytest.mark.parametrize("kwargs", MODES.values(), ids=MODES)


@pytest.fixture(scope="module", params=[DragonExecutionBackendV3, LocalExecutionBackend], ids=["dragon", "local"])
async def session(request: pytest.FixtureRequest) -> AsyncIterator[Session]:
    unbuffered = os.environ.pop("PYTHONUNBUFFERED", None)  # C would write each line out by itself
    try:
        async with Session([await request.param(num_workers=1)]) as session:
            yield session
    finally:
        if unbuffered is not None:
            os.environ["PYTHONUNBUFFERED"] = unbuffered


async def one_after_the_other(session: Session, *tasks: ComputeTask | ForEach) -> list[Any]:
    for task in tasks:
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=60)
    return list(tasks)


async def run(session: Session, function: Callable[..., Any] | Source | Module, **kwargs: Any) -> ComputeTask:
    (task,) = await one_after_the_other(session, ComputeTask(function, **kwargs))
    assert isinstance(task, ComputeTask)
    return task


# --- objects


class Model:
    label: list[int] = []  # noqa: RUF012 - that it is shared is what the test is about

    def __init__(self) -> None:
        self.seen: list[int] = []

    def fit(self, x: int) -> list[int]:
        self.seen.append(x)
        self.label.append(x)
        return [*self.seen, *self.label]


def collect(x: int, found: list[int] = []) -> list[int]:  # noqa: B006 - the same
    found.append(x)
    return list(found)


COLLECTING = Source("seen = []\ndef f(x):\n    seen.append(x)\n    return list(seen)")


async def test_no_object_of_a_function_is_kept_for_the_next(session: Session) -> None:
    model = Model()
    for make in (lambda i: ComputeTask(collect, args=(i,)), lambda i: ComputeTask(COLLECTING, args=(i,))):
        tasks = await one_after_the_other(session, *map(make, range(3)))
        assert [task.return_value for task in tasks] == [[0], [1], [2]]
    tasks = await one_after_the_other(session, *(ComputeTask(model.fit, args=(i,)) for i in range(3)))
    assert [task.return_value for task in tasks] == [[0, 0], [1, 1], [2, 2]]
    (sweep,) = await one_after_the_other(session, ForEach([0, 1, 2], lambda i, _: ComputeTask(collect, args=(i,))))
    assert sweep.return_value == [[0], [1], [2]]


def resident_mb() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmRSS"))


async def test_a_worker_keeps_nothing_of_large_functions(session: Session) -> None:
    before = (await run(session, resident_mb)).return_value
    for number in range(8):
        await run(session, partial(_length, os.urandom(1000) * 30_000), args=(number,))
    assert (await run(session, resident_mb)).return_value < before + 100


def _length(data: bytes, _: int) -> int:
    return len(data)


# --- sources

DATACLASS = """from __future__ import annotations
from dataclasses import dataclass
@dataclass
class P:
    x: float
def f():
    return P(1.0).x"""
POOL = """from multiprocessing import get_context
def square(x):
    return x * x
def f(how):
    with get_context(how).Pool(2) as pool:
        return pool.map(square, [1, 2])"""
EXECUTOR = """from concurrent.futures import ProcessPoolExecutor
class Point:
    def __init__(self, x): self.x = x
def move(point): return Point(point.x + 1)
def f():
    with ProcessPoolExecutor(2) as pool:
        return [point.x for point in pool.map(move, [Point(1), Point(2)])]"""
PICKLE = "import pickle\nclass M: pass\ndef f(): return type(pickle.loads(pickle.dumps(M()))) is M"
PYDANTIC = """from __future__ import annotations
from pydantic import BaseModel
class Tree(BaseModel):
    size: int
    parts: list[Tree] = []
def f(): return Tree(size=1, parts=[{"size": 2}]).parts[0].size"""


@in_both_modes
@pytest.mark.parametrize(
    ("text", "args", "right"),
    [
        (DATACLASS, (), 1.0),
        (POOL, ("fork",), [1, 4]),
        (POOL, ("spawn",), [1, 4]),
        (POOL, ("forkserver",), [1, 4]),
        (EXECUTOR, (), [2, 3]),
        (PICKLE, (), True),
        (PYDANTIC, (), 2),
    ],
    ids=["dataclass", "fork", "spawn", "forkserver", "executor", "pickle", "pydantic"],
)
async def test_a_source_is_a_module(
    session: Session, text: str, args: tuple[Any, ...], right: Any, kwargs: dict[str, Any]
) -> None:
    task = await run(session, Source(text), args=args, task_backend_specific_kwargs=dict(kwargs))
    assert (task.return_value, task.stderr) == (right, "")


async def test_what_a_source_defines_travels_to_whoever_has_no_such_module(session: Session) -> None:
    made = ComputeTask(Source("class Found:\n    x = 3\ndef f():\n    return Found()"))
    used = ComputeTask(Source("def g(found):\n    return found.x + 1"), args=(made,))
    await session.submit_tasks([made, used])
    await session.wait_tasks([made, used], timeout=60)
    assert (made.return_value.x, used.return_value) == (3, 4)


@in_both_modes
async def test_a_traceback_shows_the_lines_of_its_own_source(session: Session, kwargs: dict[str, Any]) -> None:
    first = "def run(x):\n    # first\n    return 1 / x"
    other = "def run(x):\n    # other\n    y = 'innocent'\n    return y"
    for text in (first, other, first):
        task = await run(session, Source(text), args=(0,), task_backend_specific_kwargs=dict(kwargs))
    assert task.traceback.splitlines()[1:3] == ['  File "<source of run>", line 3, in run', "    return 1 / x"]


@in_both_modes
async def test_an_error_at_the_top_of_a_source_tells_its_line(session: Session, kwargs: dict[str, Any]) -> None:
    text = "import os\n\nlimit = int(os.environ['NO_SUCH_LIMIT'])\ndef f():\n    return limit"
    task = await run(session, Source(text), task_backend_specific_kwargs=dict(kwargs))
    assert task.cause == "invalid"
    assert task.outcome is not None
    assert task.outcome.error.endswith("it cannot start: KeyError: 'NO_SUCH_LIMIT' (line 3 of the source)")
    assert "limit = int(os.environ['NO_SUCH_LIMIT'])" in task.traceback and "call.py" not in task.traceback


# --- forks


def forks(how: str) -> str:
    import os
    import sys

    if (pid := os.fork()) == 0:
        if how == "returns":
            return "child"
        if how == "raises":
            raise ValueError("the child's own")
        sys.exit(3)
    _, status = os.waitpid(pid, 0)
    return f"parent of {os.waitstatus_to_exitcode(status)}"


@in_both_modes
@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("raises", 1), ("exits", 3)])
async def test_a_forked_child_is_not_the_task(session: Session, how: str, code: int, kwargs: dict[str, Any]) -> None:
    task = await run(session, forks, args=(how,), task_backend_specific_kwargs=dict(kwargs))
    assert (task.state, task.return_value) == (TaskState.DONE, f"parent of {code}")
    assert ("the child's own" in (task.stderr or "")) == (how == "raises")
    alone, other = await one_after_the_other(session, ComputeTask(os.getpid), ComputeTask(os.getpid))
    assert alone.return_value == other.return_value


# --- leftovers


def leaves_alarm() -> None:
    import signal

    signal.setitimer(signal.ITIMER_REAL, 60)


def closes_stdout() -> None:
    import sys

    sys.stdout.close()


def replaces_stdout() -> None:
    import io
    import sys

    sys.stdout = io.StringIO()


def changes_stdout() -> None:
    import sys

    sys.stdout.reconfigure(encoding="ascii", line_buffering=False)  # type: ignore[union-attr]


def closes_descriptors() -> None:
    import os

    os.closerange(0, 3)


def closes_all_descriptors() -> None:
    import os

    os.closerange(3, 4096)


def redirects_descriptors() -> None:
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def lowers_limits() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))


def makes_warnings_errors() -> None:
    import warnings

    warnings.simplefilter("error")


def takes_signals() -> None:
    import signal

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})


def prints_later() -> None:
    import threading
    import time

    def late() -> None:
        time.sleep(0.2)
        print("late")

    threading.Thread(target=late, daemon=True).start()


def changes_the_process() -> None:
    import os
    import sys

    os.environ["LEFT"] = "there"
    del os.environ["PATH"]
    os.umask(0)
    os.chdir("/")
    sys.path[:] = []
    sys.setrecursionlimit(60)
    sys.settrace(lambda *_: None)


def replaces_print() -> None:
    import builtins

    builtins.print = lambda *_, **__: None


def configures_logging() -> None:
    import logging

    logging.basicConfig(level=logging.DEBUG, format="%(message)s of another task")
    logging.getLogger("innocent").setLevel(logging.CRITICAL)
    logging.disable(logging.ERROR)


def leaves_a_process() -> None:
    import subprocess

    subprocess.Popen(["sh", "-c", "sleep 0.2; echo late; sleep 300"])


def opens_stdout_anew() -> None:
    with open("/dev/stdout", "w") as file:
        file.write("anew\n")


def redirects_into_a_pipe() -> None:
    import os

    os.dup2(os.pipe()[1], 1)


def redirects_into_the_other() -> None:
    import os

    os.dup2(2, 1)
    os.dup2(os.open("/etc/hostname", os.O_RDONLY), 0)


def does_not_block() -> None:
    import os

    os.set_blocking(1, False)


def replaces_methods() -> None:
    import builtins
    import sys

    sys.stdout.write = lambda _: 0  # type: ignore[method-assign]
    builtins.sum = lambda *_: -1  # type: ignore[assignment]


def closes_stdin() -> None:
    import sys

    sys.stdin.close()


def drops_its_rights() -> None:
    import os

    if os.geteuid() == 0:
        os.seteuid(65534)


def changes_what_lies_in_c() -> None:
    import gc
    import socket
    import sys
    import threading

    socket.setdefaulttimeout(1e-6)
    threading.settrace(lambda *_: print("traced"))
    gc.callbacks.append(lambda *_: print("collected"))
    sys.meta_path.clear()


LEAVING = [
    *(redirects_into_a_pipe, redirects_into_the_other, does_not_block, replaces_methods, closes_stdin),
    *(drops_its_rights, changes_what_lies_in_c),
    *(leaves_alarm, closes_stdout, replaces_stdout, changes_stdout, closes_descriptors, closes_all_descriptors),
    *(redirects_descriptors, lowers_limits, makes_warnings_errors, takes_signals, prints_later, changes_the_process),
    *(replaces_print, configures_logging, leaves_a_process, opens_stdout_anew),
]


def innocent() -> list[Any]:
    import gc
    import importlib.util
    import logging
    import os
    import signal
    import socket
    import sys
    import threading
    import time
    import warnings

    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()

    warnings.warn("only a warning", stacklevel=1)
    logging.getLogger("innocent").error("only an error")
    time.sleep(0.3)
    for file in [open("/dev/null") for _ in range(20)]:
        file.close()
    print("grüße")
    sys.stderr.write("said\n")
    return [
        *(os.environ.get("LEFT"), "PATH" in os.environ, oct(os.umask(0o22)), os.getcwd(), bool(sys.path)),
        *(sys.getrecursionlimit(), sys.gettrace(), str(signal.getsignal(signal.SIGUSR1))),
        *(str(signal.getsignal(signal.SIGTERM)), len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
        *(os.system("true"), os.geteuid(), sum([1, 2]), sys.stdin.read(), socket.getdefaulttimeout()),
        *(importlib.util.find_spec("colorsys") is not None, signal.getitimer(signal.ITIMER_REAL)),
    ]


@pytest.mark.parametrize("first", LEAVING, ids=lambda function: function.__name__)
async def test_what_one_function_leaves_does_not_reach_the_next(session: Session, first: Callable[[], None]) -> None:
    alone = await run(session, innocent)
    assert alone.state is TaskState.DONE and alone.stdout == "grüße\n"
    before, after = await one_after_the_other(session, ComputeTask(first), ComputeTask(innocent))
    assert before.state is TaskState.DONE, before.outcome
    assert any("still ran when it ended" in note for note in before.notes) == (first is leaves_a_process)
    assert after.state is TaskState.DONE, after.outcome
    assert after.return_value == alone.return_value
    assert (after.stdout, after.stderr) == (alone.stdout, alone.stderr)


def seeds() -> None:
    import random

    import numpy

    random.seed(7)
    numpy.random.seed(7)


def draws() -> list[float]:
    import random

    import numpy

    return [random.random(), float(numpy.random.random())]


async def test_a_seed_is_not_for_the_next_function(session: Session) -> None:
    drawn = []
    for _ in range(2):
        _, task = await one_after_the_other(session, ComputeTask(seeds), ComputeTask(draws))
        drawn += task.return_value
    assert len({*drawn}) == 4


def squares() -> list[int]:
    import multiprocessing

    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        return pool.map(abs, [-1, -2])


async def test_helpers_of_multiprocessing_serve_the_next_function_too(session: Session) -> None:
    tasks = await one_after_the_other(session, *(ComputeTask(squares) for _ in range(3)))
    assert [task.return_value for task in tasks] == [[1, 2]] * 3
    assert [(task.stderr, task.notes) for task in tasks] == [("", ())] * 3


def starts_a_thread(path: str) -> str:
    import threading
    import time

    def work() -> None:
        time.sleep(0.3)
        with open(path, "w") as file:
            file.write("whole")
        print("written")

    threading.Thread(target=work).start()
    return "returned"


@in_both_modes
async def test_a_thread_that_is_no_daemon_comes_to_its_end(
    session: Session, tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    path = tmp_path / "file"
    task = await run(session, starts_a_thread, args=(str(path),), task_backend_specific_kwargs=dict(kwargs))
    assert (task.return_value, task.stdout, path.read_text()) == ("returned", "written\n", "whole")


async def test_workers_that_were_replaced_leave_no_files(session: Session) -> None:
    (backend,) = session.backends
    folder: Path = backend._engine.folder.path  # type: ignore[attr-defined]  # nothing else knows where it prints
    await one_after_the_other(session, *(ComputeTask(prints_later) for _ in range(3)))
    await wait_until(lambda: len({path.stem for path in folder.glob("p*.out")}) == 1)
    await wait_until(lambda: len(list(folder.glob("p*.moves"))) == 1)


def leaves_a_pool() -> None:
    from concurrent.futures import ThreadPoolExecutor

    ThreadPoolExecutor(2).submit(print, "pooled")


def uses_a_pool() -> list[int]:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(abs, [-1, -2]))


async def test_a_pool_that_a_function_leaves_does_its_work_and_the_next_one_works(session: Session) -> None:
    left, used = await one_after_the_other(session, ComputeTask(leaves_a_pool), ComputeTask(uses_a_pool))
    assert (left.stdout, used.return_value) == ("pooled\n", [1, 2]), used.outcome


class Heavy(Exception):
    def __init__(self) -> None:
        super().__init__("too much")
        self.data = bytes(1_000_000)


def raises_heavy() -> None:
    raise Heavy


async def test_an_exception_that_holds_much_comes_as_words_alone(session: Session) -> None:
    task = await run(session, raises_heavy)
    assert task.outcome is not None and task.exception is not None
    assert (task.outcome.error, task.exception.__cause__) == ("Heavy: too much", None)


# --- what is printed


def prints_from_c(text: str) -> int:
    import ctypes

    ctypes.CDLL(None).printf(text.encode())
    return len(text)


@in_both_modes
async def test_what_c_prints_is_of_the_task_that_printed_it(session: Session, kwargs: dict[str, Any]) -> None:
    texts = [f"energy {number}" for number in range(20)]
    tasks = await one_after_the_other(
        session,
        *(ComputeTask(prints_from_c, args=(text,), task_backend_specific_kwargs=dict(kwargs)) for text in texts),
    )
    assert [task.stdout for task in tasks] == texts


def prints_and(ends: str) -> None:
    import ctypes
    import os
    import signal
    import time

    print("step 3: reading block 17")
    ctypes.CDLL(None).puts(b"from C")
    if ends == "abort":
        os.abort()
    if ends == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while True:  # nothing interrupts it
        try:
            time.sleep(60)
        except BaseException:  # not even that
            continue


@in_both_modes
@pytest.mark.parametrize("ends", ["abort", "kill", "timeout"])
async def test_what_was_printed_survives_the_process(session: Session, ends: str, kwargs: dict[str, Any]) -> None:
    limited = {**kwargs, "timeout": 10 if kwargs else 1} if ends == "timeout" else dict(kwargs)
    task = await run(session, prints_and, args=(ends,), task_backend_specific_kwargs=limited)
    assert task.cause == ("timeout" if ends == "timeout" else "crashed")
    assert task.stdout == "step 3: reading block 17\nfrom C\n"
    assert (await run(session, abs, args=(-1,))).stdout == ""


ANEW = "echo header; echo body > /dev/stdout; echo note >&2; echo x | tee /dev/stderr >/dev/null"


@in_both_modes
async def test_a_program_that_opens_stdout_anew_keeps_what_was_printed(
    session: Session, kwargs: dict[str, Any]
) -> None:
    task = ComputeTask(executable="sh", arguments=["-c", ANEW], task_backend_specific_kwargs=dict(kwargs))
    await one_after_the_other(session, task)
    assert (task.return_value, task.stderr) == ("header\nbody", "note\nx\n")


def prints_and_opens_anew() -> None:
    import subprocess

    print("header")
    subprocess.run(["sh", "-c", "echo body > /dev/stdout"], check=True)
    with open("/dev/stdout", "w") as file:
        file.write("end\n")


@in_both_modes
async def test_so_does_a_function(session: Session, kwargs: dict[str, Any]) -> None:
    task = await run(session, prints_and_opens_anew, task_backend_specific_kwargs=dict(kwargs))
    assert task.stdout == "header\nbody\nend\n"


# --- modules


@in_both_modes
async def test_a_module_that_was_edited_runs_as_edited(
    session: Session, tmp_path: Path, kwargs: dict[str, Any]
) -> None:
    folder = tmp_path / "modules"
    folder.mkdir()
    find = "import sys\ndef f(folder):\n    sys.path.append(folder)\n    import edited_one\n    return edited_one.run()"
    (folder / "edited_one.py").write_text("def run():\n    return 'early'\n")
    assert (await run(session, Source(find), args=(str(folder),))).return_value == "early"
    (folder / "edited_one.py").unlink()
    assert (await run(session, Source(find), args=(str(folder),))).cause == "error"
    for version in "abc":
        (folder / "edited_one.py").write_text(f"def run():\n    return {version!r}\n")  # in the same second, as long
        task = await run(session, Source(find), args=(str(folder),), task_backend_specific_kwargs=dict(kwargs))
        assert task.return_value == version


@in_both_modes
async def test_a_module_in_the_folder_of_the_session_is_found(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    (tmp_path / "beside_one.py").write_text("def run():\n    return 'found'\n")
    backend = LocalExecutionBackend(num_workers=1)
    backend.cwd = str(tmp_path)
    async with Session([backend]) as session:
        task = await run(session, Module("beside_one:run"), task_backend_specific_kwargs=dict(kwargs))
    assert task.return_value == "found"


# --- text of user code


def cannot_read() -> None:
    raise ValueError("cannot read " + os.fsdecode(b"caf\xe9.dat"))


class Found:
    def __repr__(self) -> str:
        return "Found " + os.fsdecode(b"caf\xe9.dat")


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nothing to say")


class Panic(BaseException):
    """As Rust's is, when it reaches Python."""


def raises(what: str) -> None:
    raise {"silent": Silent(), "panic": Panic("called unwrap"), "stop": KeyboardInterrupt("by hand")}[what]


def raises_long() -> None:
    raise ValueError("bad data: " + "x" * 5_000_000)


@in_both_modes
async def test_words_of_user_code_are_sent_whatever_they_are(session: Session, kwargs: dict[str, Any]) -> None:
    how: dict[str, Any] = {"task_backend_specific_kwargs": kwargs}
    task = await run(session, cannot_read, **how)
    assert (task.cause, task.outcome and task.outcome.error) == ("error", "ValueError: cannot read caf\\udce9.dat")
    assert "caf\\udce9.dat" in task.traceback
    assert (await run(session, Found, **how)).state is TaskState.DONE
    for what, said in (("silent", "Silent: (what it says"), ("panic", "Panic: called unwrap"), ("stop", "KeyboardI")):
        task = await run(session, raises, args=(what,), **how)
        assert task.cause == "error" and task.outcome is not None
        assert task.outcome.error.startswith(said) and "in raises" in task.traceback


@in_both_modes
async def test_words_of_user_code_are_bounded(session: Session, kwargs: dict[str, Any]) -> None:
    task = await run(session, raises_long, task_backend_specific_kwargs=dict(kwargs))
    assert task.outcome is not None
    assert len(task.outcome.error) < 2_200 and len(task.traceback) < 8_500
    assert task.outcome.error.startswith("ValueError: bad data: xxx") and "in raises_long" in task.traceback


class Leaves:
    def __reduce__(self) -> Any:
        return sys.exit, ()


async def test_a_result_that_cannot_be_opened_fails_its_task_alone(session: Session) -> None:
    task = await run(session, Leaves)
    assert task.state is TaskState.FAILED and task.outcome is not None
    assert task.outcome.error.startswith("its result cannot be opened here: SystemExit")


def large_number() -> int:
    return 10**5000


@in_both_modes
async def test_whole_numbers_of_any_length_are_results(session: Session, kwargs: dict[str, Any]) -> None:
    assert (await run(session, large_number, task_backend_specific_kwargs=dict(kwargs))).return_value == 10**5000
