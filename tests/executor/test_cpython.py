"""The tests that CPython has for its own executors, which it installs in some builds: here with ours.

They are imported, never copied. Where they expect a BrokenProcessPool, any BrokenExecutor will do.
"""

from __future__ import annotations

import concurrent.futures.process
import functools
import importlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest

from rhapsody_mcp.api.calls import RemoteTraceback
from tests.executor.standard import Executor

PACKAGE = "test.test_concurrent_futures"
pytest.importorskip(f"{PACKAGE}.util", reason="this Python is installed without its own tests (a package `test`)")

executor, util, deadlock, init, process_pool, shutdown, wait, as_completed = (
    importlib.import_module(f"{PACKAGE}.{name}")
    for name in (
        *("executor", "util", "test_deadlock", "test_init", "test_process_pool", "test_shutdown", "test_wait"),
        "test_as_completed",
    )
)
_PROCESSES = "asks for the processes of the pool, which our executor does not have: they are the engine's"
_PRINTS = "what a call prints is in its task, not on the stdout of the program"
_INITIALIZER = "an initializer is refused, with what to do instead: workers serve the functions of many"
_INVALID = "what cannot be opened where it runs makes a TaskFailed with cause invalid: the worker goes on"
_UNSENDABLE = "a result that cannot be sent makes a TaskFailed, which says what to return"
EXCLUDED = {
    "test_cancel_futures": "before the engine has started no call has, and all are canceled; it expects some to run",
    "test_error_at_task_pickle": "what cannot be sent makes an InvalidTask, which names the reason and what to do",
    "test_error_at_task_unpickle": _INVALID,
    "test_error_during_result_pickle_on_worker": _UNSENDABLE,
    "test_error_during_result_unpickle_in_result_handler": "a result that cannot be opened here makes a TaskFailed",
    "test_exit_at_task_unpickle": _INVALID,
    "test_exit_during_result_pickle_on_worker": _UNSENDABLE,
    "test_exit_during_result_unpickle_in_result_handler": "a result that cannot be opened here makes a TaskFailed",
    "test_hang_gh83386": _PRINTS,
    "test_idle_process_reuse_multiple": _PROCESSES,
    "test_idle_process_reuse_one": _PROCESSES,
    "test_initializer": _INITIALIZER,
    "test_interpreter_shutdown": _PRINTS,
    "test_killed_child": _PROCESSES,
    "test_max_tasks_early_shutdown": "max_tasks_per_child is refused: options(cores=1) gives each call a process",
    "test_max_tasks_per_child": "max_tasks_per_child is refused: options(cores=1) gives each call a process",
    "test_max_tasks_per_child_defaults_to_spawn_context": "max_tasks_per_child is refused",
    "test_max_workers_negative": "the backend refuses the number, in its own words",
    "test_python_finalization_error": "expects the second thread to break the executor; ours starts all at once",
    "test_ressources_gced_in_workers": "needs a manager of multiprocessing, whose key only its own children have",
    "test_saturation": _PROCESSES,
    "test_shutdown_deadlock_pickle": "asks for a thread of ProcessPoolExecutor",
    "test_traceback": "cloudpickle sends the function of a class method by value, for which there is no line of source",
}
"""By name, why a test does not hold here. Each is run nevertheless, and has to fail."""
TIMED = (
    *("test_first_completed", "test_first_exception", "test_first_exception_some_already_complete"),
    *("test_free_reference", "test_map_timeout", "test_timeout"),
)
"""Tests that take a moment for granted: each has three attempts."""
LEFT_OUT = {
    "FailingInitializerResourcesTest": "runs tests of ProcessPoolExecutor",
    "FutureTests": "is about the futures of the standard library, which are those of ours",
    "ProcessPoolShutdownTest": "makes a ProcessPoolExecutor in each test, and looks at its processes",
    "ThreadPoolExecutorTest": "has calls that change the process of the test, and looks at threads",
    "ThreadPoolShutdownTest": "makes a ThreadPoolExecutor in each test, and looks at its threads",
    "ThreadPoolWaitTests": "has calls that wait for an event in the process of the test",
}
"""By name, why a class of tests is not here."""


class ExecutorMixin(util.ExecutorMixin):  # type: ignore[misc,name-defined]
    executor_type = Executor

    def get_context(self) -> None:
        """The way in which the backend starts its processes."""


def class_of(name: str, *bases: type) -> type:
    """A class of tests, in which those excluded are expected to fail."""
    made = type(name, (*bases, ExecutorMixin, util.BaseTestCase), {"__module__": __name__})
    for method in [method for method in dir(made) if method.startswith("test_")]:
        if reason := EXCLUDED.get(method):
            strict = method != "test_cancel_futures"  # on a busy machine some calls may have started
            setattr(made, method, pytest.mark.xfail(reason=reason, strict=strict)(copied(getattr(made, method))))
        elif method in TIMED:
            setattr(made, method, attempted(getattr(made, method)))
    return made


def copied(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def test(self: object) -> None:
        method(self)

    return test


def attempted(method: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(method)
    def test(self: Any) -> None:
        for _ in range(2):
            try:
                return method(self)
            except AssertionError:
                self.executor.shutdown()
                self.setUp()
        return method(self)

    return test


TestCalls = class_of("TestCalls", process_pool.ProcessPoolExecutorTest)
TestWait = class_of("TestWait", wait.WaitTests)
TestAsCompleted = class_of("TestAsCompleted", as_completed.AsCompletedTests)
TestShutdown = class_of("TestShutdown", shutdown.ExecutorShutdownTest)
TestDeadlock = class_of("TestDeadlock", deadlock.ExecutorDeadlockTest)
TestInitializer = class_of("TestInitializer", init.InitializerMixin)
TestFailingInitializer = class_of("TestFailingInitializer", init.FailingInitializerMixin)


@pytest.fixture(autouse=True)
def _words_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (deadlock, process_pool):
        monkeypatch.setattr(module, "BrokenProcessPool", BrokenExecutor)
    monkeypatch.setattr(concurrent.futures.process, "_RemoteTraceback", RemoteTraceback)
    monkeypatch.setattr(shutdown, "assert_python_ok", functools.partial(program, shutdown.assert_python_ok))


def program(run: Callable[..., Any], option: str, text: str) -> Any:
    """Run a program of the tests with our executor."""
    ours = text.replace("from concurrent.futures import Executor", f"from {Executor.__module__} import Executor")
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return run(option, ours, __isolated=False, PYTHONPATH=path)


lists_of_this_version = pytest.mark.skipif(sys.version_info[:2] != (3, 13), reason="the lists are for Python 3.13")


@lists_of_this_version
def test_what_is_excluded_is_there() -> None:
    classes = (TestCalls, TestShutdown, TestDeadlock, TestInitializer)
    assert not EXCLUDED.keys() - {name for tests in classes for name in dir(tests)}


@lists_of_this_version
def test_every_class_of_tests_is_here_or_left_out() -> None:
    made = (TestCalls, TestWait, TestAsCompleted, TestShutdown, TestDeadlock, TestInitializer, TestFailingInitializer)
    here = {base.__name__ for tests in made for base in tests.__mro__[1:]}
    folder = importlib.import_module(PACKAGE).__path__
    modules = [importlib.import_module(f"{PACKAGE}.{module.name}") for module in iter_modules(folder)]
    there = {
        name: part
        for module in modules
        for name, part in vars(module).items()
        if isinstance(part, type) and any(method.startswith("test_") for method in vars(part))
    }
    assert there.keys() - here == LEFT_OUT.keys()
