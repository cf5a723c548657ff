"""A session as an executor of `concurrent.futures`, as programs use executors that know nothing of sessions."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from rhapsody_mcp.api import ComputeTask, InvalidTask, Session, SessionClosed, SessionExecutor, TaskFailed
from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.states import Cause, TaskState
from tests.processes import wait_until

pytestmark = pytest.mark.anyio
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def executor() -> Iterator[SessionExecutor]:
    with SessionExecutor(LocalExecutionBackend(num_workers=2)) as executor:
        yield executor


class Once:
    """A file that tasks wait for, and one by which they tell that they run."""

    def __init__(self, folder: Path) -> None:
        self.started, self.go = folder / "started", folder / "go"

    def call(self) -> Callable[[], str]:
        started, go = str(self.started), str(self.go)

        def held() -> str:
            import time
            from pathlib import Path

            Path(started).touch()
            while not Path(go).exists():
                time.sleep(0.01)
            return "went"

        return held

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not self.started.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def once(tmp_path: Path) -> Once:
    return Once(tmp_path)


def wait_for(future: Future[Any], holds: Callable[[Future[Any]], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds(future):
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- a plain program


def test_lambdas_and_closures_are_called_with_all_arguments(executor: SessionExecutor) -> None:
    factor = 3

    def scaled(n: int, *, plus: int) -> int:
        return factor * n + plus

    assert executor.submit(scaled, 4, plus=1).result(LIMIT_S) == 13
    assert executor.submit(lambda: factor).result(LIMIT_S) == 3


async def test_an_async_function_is_awaited_where_it_runs(executor: SessionExecutor) -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    assert executor.submit(answer).result(LIMIT_S) == 42  # type: ignore[comparison-overlap]


def test_ten_thousand_calls_of_several_threads_end_each_with_its_own_result(executor: SessionExecutor) -> None:
    submitted: list[list[Future[int]]] = [[] for _ in range(4)]

    def submit(part: int) -> None:
        submitted[part] += [executor.submit(abs, -n) for n in range(part * 2500, (part + 1) * 2500)]

    threads = [threading.Thread(target=submit, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [future.result(LIMIT_S) for part in submitted for future in part] == list(range(10_000))


def test_map_gives_results_in_order_alone_and_in_chunks(executor: SessionExecutor) -> None:
    assert list(executor.map(pow, range(50), [2] * 50)) == [n**2 for n in range(50)]
    assert list(executor.map(lambda n: n + 1, range(1000), chunksize=99)) == list(range(1, 1001))


def test_map_with_a_buffer_takes_items_only_as_results_are_taken(executor: SessionExecutor) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for n in range(1_000_000):
            taken.append(n)
            yield n

    results = executor.map(abs, items(), buffersize=5)
    assert len(taken) == 5
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(taken) == 8


@pytest.mark.parametrize("buffersize", [None, 1, 2, 9])
def test_map_takes_no_more_of_one_iterable_than_zip_does(executor: SessionExecutor, buffersize: int | None) -> None:
    longer = iter(range(10))
    assert list(executor.map(pow, longer, [2, 2, 2], buffersize=buffersize)) == [0, 1, 4]
    assert next(longer) == 4


@pytest.mark.parametrize("size", ["chunksize", "buffersize"])
def test_map_refuses_a_size_below_one(executor: SessionExecutor, size: str) -> None:
    sizes: dict[str, Any] = {size: 0}
    with pytest.raises(ValueError, match=f"{size} must be >= 1"):
        executor.map(abs, [1], **sizes)


def test_map_stops_at_its_timeout_and_cancels_what_has_not_started(executor: SessionExecutor, once: Once) -> None:
    assert executor.submit(abs, -1).result(LIMIT_S) == 1  # its engine has started
    results = executor.map(lambda call: call(), [lambda: 1, *[once.call()] * 3], timeout=5.0)
    assert next(results) == 1
    with pytest.raises(TimeoutError):
        next(results)
    once.go.touch()


def test_the_exception_of_a_function_is_raised_with_its_remote_traceback(executor: SessionExecutor) -> None:
    def inner() -> None:
        raise KeyError("no such seed")

    with pytest.raises(KeyError, match="no such seed") as caught:
        executor.submit(inner).result(LIMIT_S)
    assert ", in inner\n" in str(caught.value.__cause__)


def test_a_crash_ends_one_call_and_leaves_the_executor(executor: SessionExecutor, once: Once) -> None:
    held = executor.submit(once.call())
    crashed = executor.submit(os._exit, 3)
    with pytest.raises(BrokenExecutor, match="exit code 3"):
        crashed.result(LIMIT_S)
    with pytest.raises(TaskFailed) as caught:
        crashed.result()
    assert caught.value.outcome is not None and caught.value.outcome.cause is Cause.CRASHED
    once.go.touch()
    assert held.result(LIMIT_S) == "went"
    assert executor.submit(abs, -1).result(LIMIT_S) == 1


def test_what_cannot_be_sent_fails_its_own_future_alone(executor: SessionExecutor) -> None:
    lock = threading.Lock()
    futures: list[Future[Any]] = [executor.submit(id, lock if n == 3 else n) for n in range(6)]
    assert [future.exception(LIMIT_S) is None for future in futures] == [True, True, True, False, True, True]
    with pytest.raises(InvalidTask, match="cannot be sent to another process: TypeError"):
        futures[3].result()


class ExitsWhenSent:
    def __reduce__(self) -> str:
        sys.exit("sent")


def test_an_argument_that_exits_when_it_is_sent_fails_its_own_future_alone(executor: SessionExecutor) -> None:
    with pytest.raises(SystemExit, match="sent"):
        executor.submit(id, ExitsWhenSent()).result(LIMIT_S)
    assert executor.submit(abs, -1).result(LIMIT_S) == 1


def test_files_that_a_call_leaves_are_in_its_result(executor: SessionExecutor) -> None:
    def leave() -> int:
        from pathlib import Path

        Path("left.txt").write_text("here")
        return 3

    with TemporaryDirectory() as folder:
        leaves = executor.options(outputs=["left.txt"], process_template={"cwd": folder})
        result: Any = leaves.submit(leave).result(LIMIT_S)
    assert (result["result"], Path(result["files"]["left.txt"]).read_text()) == (3, "here")


def test_a_future_runs_from_the_start_of_its_call_and_is_then_not_canceled(
    executor: SessionExecutor, once: Once
) -> None:
    future = executor.submit(once.call())
    once.wait_until_started()
    wait_for(future, Future.running)
    assert not future.cancel()
    once.go.touch()
    assert future.result(LIMIT_S) == "went"


def test_a_future_that_is_canceled_before_its_start_never_runs(tmp_path: Path, once: Once) -> None:
    with SessionExecutor(LocalExecutionBackend(num_workers=1)) as executor:
        first = executor.submit(once.call())
        waits = executor.submit(Path.touch, tmp_path / "ran")
        once.wait_until_started()
        assert waits.cancel() and waits.cancelled()
        done, not_done = wait([waits], timeout=LIMIT_S)
        assert (done, not_done) == ({waits}, set())
        with pytest.raises(CancelledError):
            waits.result()
        once.go.touch()
        assert first.result(LIMIT_S) == "went"
    assert not (tmp_path / "ran").exists()
    assert [task.state for task in executor.session.tasks] == [TaskState.DONE, TaskState.CANCELED]


def test_futures_that_are_canceled_at_any_moment_all_end(tmp_path: Path) -> None:
    def append(number: int) -> int:
        with open(tmp_path / "ran", "a") as file:
            file.write(f"{number}\n")
        return number

    with SessionExecutor(LocalExecutionBackend(num_workers=2)) as executor:
        futures = [executor.submit(append, number) for number in range(3000)]
        threads = [threading.Thread(target=lambda part=part: [f.cancel() for f in futures[part::4]]) for part in (1, 2)]
        for thread in threads:
            thread.start()
        done, not_done = wait(futures, timeout=LIMIT_S)
        for thread in threads:
            thread.join()
    assert not not_done and {future for future in done if not future.cancelled()} >= {*futures[0::4], *futures[3::4]}
    assert [f.result() for f in futures if not f.cancelled()] == [n for n, f in enumerate(futures) if not f.cancelled()]
    ran = {int(line) for line in (tmp_path / "ran").read_text().split()}
    assert ran >= {number for number, future in enumerate(futures) if not future.cancelled()}


def test_completed_futures_come_as_they_complete(executor: SessionExecutor, once: Once) -> None:
    held, quick = executor.submit(once.call()), executor.submit(str, "quick")
    order = as_completed([held, quick], LIMIT_S)
    assert next(order) is quick
    once.go.touch()
    assert next(order) is held


# --- options


def test_options_say_how_calls_run_and_leave_the_executor_as_it_was(executor: SessionExecutor) -> None:
    def threads() -> str | None:
        return os.environ.get("OMP_NUM_THREADS")

    bound = executor.options(cores=1, name="bound").options(timeout=60)
    assert bound.submit(threads).result(LIMIT_S) == "1"
    task = executor.session.tasks[-1]
    assert isinstance(task, ComputeTask)
    assert (task.name, task.task_backend_specific_kwargs) == ("bound", {"cores": 1, "timeout": 60})
    assert executor.submit(threads).result(LIMIT_S) != "1"
    assert list(bound.map(abs, [-1, -2])) == [1, 2]


def test_options_that_no_task_has_are_refused_at_once(executor: SessionExecutor) -> None:
    with pytest.raises(InvalidTask, match=r"'core'.*cores"):
        executor.options(core=1)
    with pytest.raises(InvalidTask, match="retries"):
        executor.options(retries=-1)


def test_more_gpus_than_there_are_fail_the_call(executor: SessionExecutor) -> None:
    with pytest.raises(InvalidTask, match="GPU"):
        executor.options(gpus=1000).submit(abs, 1).result(LIMIT_S)


def test_a_call_with_retries_ends_with_its_last_attempt(executor: SessionExecutor, tmp_path: Path) -> None:
    def second_time() -> str:
        if not (tmp_path / "first").exists():
            (tmp_path / "first").touch()
            raise OSError("not yet")
        return "now"

    assert executor.options(retries=1, retry_delay_s=0).submit(second_time).result(LIMIT_S) == "now"


def test_long_arguments_and_results_leave_no_files_behind(executor: SessionExecutor) -> None:
    assert executor.submit(len, bytes(1_000_000)).result(LIMIT_S) == 1_000_000
    assert executor.submit(bytes, 1_000_000).result(LIMIT_S) == bytes(1_000_000)
    assert not [file for file in executor.session.folder.rglob("*") if file.stat().st_size >= 1_000_000]


@pytest.mark.parametrize("argument", ["max_workers", "initializer", "mp_context", "max_tasks_per_child"])
def test_arguments_of_other_executors_are_refused_with_what_to_do(argument: str) -> None:
    arguments: dict[str, Any] = {argument: None}
    with pytest.raises(InvalidRequest, match=f"takes no {argument}=: .*"):
        SessionExecutor(**arguments)


# --- the end


def test_after_shutdown_no_call_is_taken_and_the_session_can_be_asked(tmp_path: Path) -> None:
    with SessionExecutor(LocalExecutionBackend(num_workers=1), uid="mine") as executor:
        futures = [executor.submit(abs, -n) for n in range(20)]
    assert [future.result(0) for future in futures] == list(range(20))
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(abs, 1)
    assert repr(executor.session) == "<Session mine (closed): 20 DONE>"
    assert executor.session.report(tmp_path / "report.html").exists()


def test_shutdown_cancels_what_has_not_started_where_it_is_asked_to(once: Once) -> None:
    executor = SessionExecutor(LocalExecutionBackend(num_workers=1))
    first = executor.submit(once.call())
    others = [executor.submit(abs, n) for n in range(1000)]
    once.wait_until_started()
    wait_for(first, Future.running)
    executor.shutdown(wait=False, cancel_futures=True)
    once.go.touch()
    assert first.result(LIMIT_S) == "went"
    executor.shutdown()
    assert all(future.cancelled() for future in others)


def test_an_executor_that_is_forgotten_ends_with_its_calls() -> None:
    executor = SessionExecutor(LocalExecutionBackend(num_workers=1))
    session, future = executor.session, executor.submit(abs, -1)
    (thread,) = [thread for thread in threading.enumerate() if session.uid in thread.name]
    del executor
    gc.collect()
    thread.join(LIMIT_S)
    assert future.result(0) == 1 and session.closed


def test_the_session_keeps_neither_arguments_nor_results_of_calls_that_have_ended(executor: SessionExecutor) -> None:
    future = executor.submit(list, [1, 2])
    assert future.result(LIMIT_S) == [1, 2]
    task = executor.session.tasks[-1]
    assert isinstance(task, ComputeTask)
    assert (task.state, task.args, task.return_value, task.what) == (TaskState.DONE, (), None, "list")


PROGRAM = """if True:
    import os, signal, sys, time
    from pathlib import Path
    from rhapsody_mcp.api import SessionExecutor
    from rhapsody_mcp.backends import DragonExecutionBackendV3, LocalExecutionBackend
    def slow(name, seconds):
        import time
        from pathlib import Path
        Path(name + ".started").touch()
        time.sleep(seconds)
        Path(name).touch()
    def start():
        executor = SessionExecutor(LocalExecutionBackend(num_workers=1))
        future = executor.submit(slow, sys.argv[1], float(sys.argv[2]))
        while not Path(sys.argv[1] + ".started").exists():
            time.sleep(0.01)
        return executor, future
"""


def run_program(text: str, file: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM + text, str(file), str(seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_a_program_that_forgets_shutdown_ends_once_its_calls_have(tmp_path: Path) -> None:
    text = "    executor, future = start()\n    print('end of main')\n"
    ended = run_program(text, tmp_path / "done", 0.5)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("end of main\n", "", 0)
    assert (tmp_path / "done").exists()


def test_a_program_whose_last_line_submits_ends_once_the_calls_have(tmp_path: Path) -> None:
    text = """
    executor = SessionExecutor(LocalExecutionBackend(num_workers=1))
    executor.submit(slow, sys.argv[1], float(sys.argv[2])), executor.submit(bytes, 1_000_000)
    """
    ended = run_program(text, tmp_path / "done", 0.1)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("", "", 0)
    assert (tmp_path / "done").exists()


def test_a_program_that_is_interrupted_cancels_what_runs(tmp_path: Path) -> None:
    heeded = "    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a parent may have ignored\n"
    text = f"{heeded}    with start()[0]:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\n"
    began = time.monotonic()
    ended = run_program(text, tmp_path / "done", 50)
    assert "KeyboardInterrupt" in ended.stderr and ended.returncode == -signal.SIGINT
    assert time.monotonic() - began < 45
    assert not (tmp_path / "done").exists()


def test_a_fork_of_the_program_has_no_part_in_its_executor(tmp_path: Path) -> None:
    text = """
    executor, future = start()
    if os.fork() == 0:
        try:
            executor.submit(abs, 1)
        except RuntimeError as error:
            print(error, flush=True)
        executor.shutdown()
        sys.exit()
    print(os.waitstatus_to_exitcode(os.wait()[1]), future.result())
    """
    command = [sys.executable, "-c", PROGRAM + text, str(tmp_path / "done"), "0.2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    refusal = "this executor belongs to the process that made it; make one in this process"
    assert ended.stdout.splitlines() == [refusal, "0 None"]


# --- an open session


async def test_an_open_session_is_the_executor_of_its_event_loop(once: Once) -> None:
    async with Session([LocalExecutionBackend(num_workers=2)]) as session:
        loop, beats = asyncio.get_running_loop(), list[float]()
        executor = SessionExecutor.of(session)

        async def beat() -> None:
            while True:
                beats.append(loop.time())
                await asyncio.sleep(0.01)

        heart = asyncio.create_task(beat())
        results = await asyncio.gather(*(loop.run_in_executor(executor, abs, -n) for n in range(500)))
        assert results == list(range(500))
        held, so_far = loop.run_in_executor(executor, once.call()), len(beats)
        await wait_until(lambda: len(beats) >= so_far + 15)
        once.go.touch()
        assert await held == "went"
        heart.cancel()
        with executor:
            future = executor.submit(abs, -7)
        assert await asyncio.wrap_future(future) == 7
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(abs, 1)
        task = ComputeTask(abs, args=(-8,))
        await session.submit_tasks(task)
        assert (await task).return_value == 8


async def test_any_thread_uses_the_executor_of_an_open_session(once: Once) -> None:
    def other_thread(executor: Executor) -> list[int]:
        with executor:
            return list(executor.map(abs, range(100), chunksize=10))

    async with Session([LocalExecutionBackend(num_workers=2)]) as session:
        assert await asyncio.to_thread(other_thread, SessionExecutor.of(session)) == list(range(100))
        held = SessionExecutor.of(session).submit(once.call())
        await asyncio.to_thread(once.wait_until_started)
        await asyncio.to_thread(wait_for, held, Future.running)
        await session.cancel(session.tasks[-1])
        assert type(held.exception(LIMIT_S)).__name__ == "TaskCanceled"
        asyncio.get_running_loop().call_later(0.1, once.go.touch)
        waits = SessionExecutor.of(session).submit(once.call())
    assert waits.cancelled() or waits.exception(0) is not None


async def test_a_call_that_has_ended_is_not_run_again_by_its_session() -> None:
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        future = SessionExecutor.of(session).submit(divmod, 1, 0)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(future)
        with pytest.raises(InvalidTask, match="call of an executor"):
            await session.retry(session.tasks)


async def test_an_executor_whose_session_is_closed_fails_its_calls() -> None:
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        executor = SessionExecutor.of(session)
    with pytest.raises(Exception, match="this session is closed"):
        await asyncio.wrap_future(executor.submit(abs, 1))


def test_an_executor_whose_event_loop_has_ended_ends_its_futures() -> None:
    async def leave() -> tuple[SessionExecutor, Future[int]]:
        executor = SessionExecutor.of(Session())
        return executor, executor.submit(abs, 1)

    executor, future = asyncio.run(leave())
    assert isinstance(executor.submit(abs, 1).exception(0), SessionClosed)
    assert isinstance(future.exception(0), SessionClosed)
    with pytest.raises(RuntimeError, match="event loop of the session has ended"):
        executor.submit(abs, 1)
    executor.shutdown()


# --- programs that take an executor


def sum_of_squares(executor: Executor, numbers: Iterable[int]) -> int:
    """Code that knows the standard interface alone, as that of libraries with an argument `executor`."""
    return sum(future.result() for future in as_completed([executor.submit(pow, n, 2) for n in numbers]))


def test_it_says_how_many_calls_run_at_a_time_as_dask_asks(executor: SessionExecutor) -> None:
    assert executor._max_workers == 2


def test_calls_run_on_dragon() -> None:
    with SessionExecutor(DragonExecutionBackendV3(num_workers=1)) as executor:
        assert list(executor.map(abs, [-1, -2])) == [1, 2]
        assert executor.options(process_template={}).submit(abs, -3).result(LIMIT_S) == 3


def test_an_executor_of_several_backends_runs_a_call_where_it_is_told() -> None:
    backends = [LocalExecutionBackend(num_workers=1, name=name) for name in ("one", "other")]
    with SessionExecutor(*backends) as executor:
        assert executor.options(backend="other").submit(abs, -1).result(LIMIT_S) == 1
        assert executor.session.tasks[-1].backend == "other"


def test_code_for_a_standard_executor_runs_unchanged(executor: SessionExecutor) -> None:
    with ProcessPoolExecutor(1) as pool:
        assert sum_of_squares(executor, range(30)) == sum_of_squares(pool, range(30))


@pytest.mark.parametrize("wrong", [[], [[]], [4], ["local"], [LocalExecutionBackend]])
def test_what_is_no_backend_is_refused_with_an_example(wrong: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"as in SessionExecutor\(LocalExecutionBackend\(.*no list"):
        SessionExecutor(*wrong)


async def test_a_backend_of_another_event_loop_is_refused() -> None:
    async with LocalExecutionBackend() as backend:
        with pytest.raises(InvalidRequest, match=r"'local' has been awaited .*SessionExecutor.of\(session\)"):
            SessionExecutor(backend)


def test_the_executor_of_a_session_is_made_in_its_event_loop() -> None:
    with pytest.raises(InvalidRequest, match=r"in the event loop of the session.*SessionExecutor\(backend\)"):
        SessionExecutor.of(Session([LocalExecutionBackend()]))
