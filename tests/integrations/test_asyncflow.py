"""Flows of RADICAL AsyncFlow whose tasks run in a session."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest
from radical.asyncflow import WorkflowEngine
from radical.asyncflow.errors import DependencyFailureError

from rhapsody_mcp.api import InvalidTask, Session, SessionClosed, TaskFailed, TaskState, UnknownName
from rhapsody_mcp.backends import LocalExecutionBackend
from rhapsody_mcp.backends.endpoint import EndpointInferenceBackend
from rhapsody_mcp.integrations import AsyncFlowBackend
from rhapsody_mcp.model.errors import InvalidRequest
from rhapsody_mcp.model.states import Cause
from tests.backends.openai_stand_in import StandIn, serve

pytestmark = pytest.mark.anyio
WITHIN_S = 600  # every wait here is for an event; one that never comes fails the test


class Flow(Protocol):
    """What the tests use of AsyncFlow, which has no types."""

    uid: str
    work_dir: str
    function_task: Callable[..., Callable[..., Any]]
    executable_task: Callable[..., Callable[..., Any]]
    prompt_task: Callable[..., Callable[..., Any]]
    block: Callable[..., Callable[..., Any]]


class Flows(Protocol):
    def __call__(self, *backends: AsyncFlowBackend) -> AbstractAsyncContextManager[Flow]: ...


@pytest.fixture
def flow_on(tmp_path: Path) -> Flows:
    @asynccontextmanager
    async def opened(*backends: AsyncFlowBackend) -> AsyncIterator[Flow]:
        flow = await WorkflowEngine.create(list(backends), work_dir=str(tmp_path))
        try:
            yield flow
        finally:
            await flow.shutdown()

    return opened


@pytest.fixture
async def session() -> AsyncIterator[Session]:
    async with Session([LocalExecutionBackend(num_workers=2)]) as opened:
        yield opened


@pytest.fixture
async def flow(session: Session, flow_on: Flows) -> AsyncIterator[Flow]:
    async with flow_on(AsyncFlowBackend(session)) as opened:
        yield opened


def started(session: Session) -> asyncio.Event:
    """Set once a task of the session runs."""
    runs = asyncio.Event()
    session.on_change.add(lambda task: runs.set() if task.state is TaskState.RUNNING else None)
    return runs


async def within(awaited: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(awaited, WITHIN_S)


async def running_program(flow: Flow, session: Session) -> Any:
    """The future of a program that runs until it is canceled."""

    @flow.executable_task
    async def wait() -> str:
        return "sleep 600"

    runs, future = started(session), wait()
    await within(runs.wait())
    return future


# --- what runs


async def test_results_are_the_arguments_of_the_next_functions(flow: Flow, session: Session) -> None:
    @flow.function_task
    async def numbers(count: int) -> list[int]:
        return list(range(count))

    @flow.function_task
    async def total(values: list[int], *, scale: int) -> int:
        return sum(values) * scale

    @flow.function_task
    async def both(*values: int) -> tuple[int, ...]:
        return values

    first = numbers(4)
    assert await both(total(first, scale=10), total(values=numbers(3), scale=1)) == (60, 3)
    assert sorted(str(task.name).partition(".")[0] for task in session.tasks) == [
        *("both", "numbers", "numbers", "total", "total")
    ]
    groups = session.get_statistics()["groups"]
    assert groups["numbers"]["counts"] == groups["total"]["counts"] == {"DONE": 2}


async def test_the_report_and_the_trace_of_the_session_name_the_tasks(
    flow: Flow, session: Session, tmp_path: Path
) -> None:
    @flow.function_task
    async def simulate() -> int:
        return 1

    await simulate()
    for file in (session.report(tmp_path / "report.html"), session.trace(tmp_path / "trace.json")):
        assert "simulate.0" in file.read_text(encoding="utf-8")


async def test_a_program_gives_what_it_printed(flow: Flow) -> None:
    @flow.executable_task
    async def say(text: str) -> str:
        return f"sh -c 'echo {text}; echo aside >&2'"

    future = say("hello")
    assert await future == "hello\n"
    assert (future.task["stderr"], future.task["exit_code"], future.state) == ("aside\n", 0, "DONE")


async def test_a_program_runs_in_a_shell_on_request(flow: Flow) -> None:
    @flow.executable_task
    async def count(**description: Any) -> str:
        return "printf 'abc' | wc -c"

    with pytest.raises(InvalidTask, match=r"'\|' in .* without a shell.*task_description=\{'shell': True\}"):
        await count()
    assert int(await count(task_description={"shell": True})) == 3
    assert await count(task_description={"shell": False}) == "abc"


async def test_what_a_program_prints_goes_into_files(flow: Flow) -> None:
    @flow.executable_task(capture_stdio=True)
    async def say() -> str:
        return "sh -c 'echo hello; echo aside >&2; exit $0' 0"

    future = say()
    stdout = Path(await future)
    assert stdout.read_text() == "hello\n"
    assert stdout == Path(flow.work_dir, flow.uid, f"{future.task['uid']}.stdout")
    assert Path(future.task["stderr"]).read_text() == "aside\n"


async def test_files_that_cannot_be_written_fail_the_task(flow: Flow, session: Session) -> None:
    @flow.executable_task(capture_stdio=True)
    async def say() -> str:
        return "echo hello"

    os.rmdir(Path(flow.work_dir, flow.uid))
    with pytest.raises(FileNotFoundError):
        await say()
    assert session.tasks[0].state is TaskState.DONE


async def test_json_and_kept_files_of_a_program_are_its_result(flow: Flow, session: Session) -> None:
    @flow.executable_task
    async def measure(**description: Any) -> str:
        return "sh -c 'echo {}; touch a.txt'"

    description = {"stdout": "json", "outputs": ["a.txt"], "cwd": flow.work_dir}
    assert await measure(task_description=description) == {
        "result": {},
        "files": {"a.txt": session.tasks[0].return_value["files"]["a.txt"]},
    }


async def test_a_task_description_asks_for_processes_and_variables(flow: Flow) -> None:
    @flow.function_task
    async def where(task_description: dict[str, Any] = {"cores": 1}) -> tuple[str | None, int]:  # noqa: B006
        return os.environ.get("MINE"), len(os.sched_getaffinity(0))

    job = {"process_templates": [(2, {"env": {"MINE": "yes"}})]}
    alone, both = await asyncio.gather(where(), where(task_description=job))
    assert alone == (None, 1)
    assert both[0] == "yes"

    @flow.executable_task
    async def show() -> str:
        return "sh -c 'echo $MINE in $PWD'"

    assert await show(task_description={"env": {"MINE": "yes"}, "cwd": flow.work_dir}) == f"yes in {flow.work_dir}\n"


async def test_a_task_that_takes_longer_than_its_time_fails(flow: Flow) -> None:
    @flow.function_task
    async def wait() -> None:
        time.sleep(600)

    with pytest.raises(TaskFailed, match=r"its time of 0\.2 s was up"):
        await wait(task_description={"timeout": 0.2})


async def test_a_task_is_retried(flow: Flow, tmp_path: Path) -> None:
    @flow.function_task
    async def second_time(log: Path) -> int:
        with log.open("a") as file:
            file.write("x")
        if len(log.read_text()) < 2:
            raise RuntimeError("the first time")
        return len(log.read_text())

    assert await second_time(tmp_path / "log", task_description={"retries": 1, "retry_delay_s": 0}) == 2


# --- prompts


async def test_a_prompt_goes_to_the_model(flow_on: Flows) -> None:
    async with serve(StandIn()) as server:
        local, served = LocalExecutionBackend(num_workers=1), EndpointInferenceBackend(server.url, name="model")
        async with Session([local, served]) as session:
            compute, model = AsyncFlowBackend(session, "local"), AsyncFlowBackend(session, "model")
            async with flow_on(compute, model) as flow:

                @flow.function_task
                async def topic() -> str:
                    return "jets"

                @flow.prompt_task(backend="model")
                async def ask(about: str) -> str:
                    return f"Tell me of {about}."

                @flow.block
                async def study() -> Any:
                    return await ask(await topic(), task_description={"temperature": 0.5, "timeout": 60})

                assert await study() == "answer to Tell me of jets."
                assert server.bodies[0]["temperature"] == 0.5
                with pytest.raises(InvalidTask, match="temprature"):
                    await ask("jets", task_description={"temprature": 0.5})
            assert {str(task.backend) for task in session.tasks} == {"local", "model"}


async def test_a_prompt_without_a_backend_for_prompts_fails(flow: Flow) -> None:
    @flow.prompt_task
    async def ask() -> str:
        return "Tell me."

    with pytest.raises(InvalidTask, match="prompt"):
        await ask()


# --- blocks


async def test_blocks_within_blocks_and_many_at_a_time(flow: Flow) -> None:
    @flow.function_task
    async def add(*values: int) -> int:
        return sum(values)

    @flow.block
    async def pair(start: int) -> int:
        return int(await add(add(start, 1), add(start, 2)))

    @flow.block
    async def pairs(start: int) -> int:
        return int(await pair(await pair(start)))

    assert await asyncio.gather(*(pairs(number) for number in range(5))) == [4 * n + 9 for n in range(5)]


async def test_a_thousand_tasks(flow: Flow) -> None:
    @flow.function_task
    async def twice(number: int) -> int:
        return 2 * number

    assert await asyncio.gather(*map(twice, range(1000))) == [2 * number for number in range(1000)]


async def test_the_end_of_a_task_is_seen_at_once(flow: Flow) -> None:
    """AsyncFlow itself looks once a second for tasks that took longer than 10 ms."""

    @flow.function_task
    async def step(number: int) -> int:
        time.sleep(0.02)
        return number + 1

    await step(0)
    before, last = time.monotonic(), step(0)
    for _ in range(19):
        last = step(last)
    assert await last == 20
    assert time.monotonic() - before < 18


# --- failures


async def test_a_failed_function_gives_its_exception(flow: Flow) -> None:
    @flow.function_task
    async def divide(number: int) -> float:
        return 1 / number

    @flow.function_task
    async def show(value: float) -> str:
        return str(value)

    failed = divide(0)
    with pytest.raises(DependencyFailureError) as caught:
        await show(failed)
    assert isinstance(caught.value.root_cause, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError) as own:
        await failed
    assert "in divide" in "".join(own.value.__notes__)


async def test_a_failed_program_tells_its_exit_code_and_what_it_printed(flow: Flow) -> None:
    @flow.executable_task
    async def fail() -> str:
        return "sh -c 'echo no input >&2; exit 3'"

    with pytest.raises(TaskFailed, match="no input") as caught:
        await fail()
    assert (caught.value.exit_code, caught.value.outcome and caught.value.outcome.cause) == (3, Cause.EXIT_CODE)


async def test_a_crash_fails_one_task(flow: Flow) -> None:
    @flow.function_task
    async def end(code: int) -> int:
        if code:
            os._exit(code)
        return code

    crashed, fine = await asyncio.gather(*map(end, (3, 0)), return_exceptions=True)
    assert isinstance(crashed, TaskFailed) and crashed.outcome and crashed.outcome.cause is Cause.CRASHED
    assert fine == 0


async def test_what_is_refused_is_refused_alone(flow: Flow) -> None:
    @flow.function_task
    async def give(value: Any) -> Any:
        return value

    wrong = [
        give(1, task_description={"core": 1}),
        give(1, task_description={"cores": -1}),
        give(1, task_description={"backend": "cloud"}),
        give(1, task_description={"uid": "mine"}),
        give(1, task_description={"outputs": 5}),
        give(threading.Lock()),
    ]
    fine = [give(number) for number in range(3)]
    errors = await asyncio.gather(*wrong, return_exceptions=True)
    assert await asyncio.gather(*fine) == [0, 1, 2]
    said = ["'core' (did you mean 'cores'?)", "cores is -1", "'cloud'", "'uid'", "'int' object is not iterable", "lock"]
    assert [text for text, error in zip(said, errors, strict=True) if text not in str(error)] == [], errors


async def test_tasks_of_a_closed_session_fail(flow_on: Flows) -> None:
    async with Session([LocalExecutionBackend(num_workers=1)]) as session:
        pass
    async with flow_on(AsyncFlowBackend(session)) as flow:

        @flow.function_task
        async def one() -> int:
            return 1

        with pytest.raises(SessionClosed):
            await one()


async def test_an_unknown_backend_is_refused(session: Session) -> None:
    with pytest.raises(UnknownName, match="unknown backend 'locl'"):
        AsyncFlowBackend(session, "locl")


# --- cancel and shutdown


async def test_a_running_task_can_be_canceled(flow: Flow, session: Session) -> None:
    future = await running_program(flow, session)
    assert future.state == "RUNNING" and future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await future
    assert (future.state, session.tasks[0].state) == ("CANCELLED", TaskState.CANCELED)


async def test_a_task_of_the_second_backend_can_be_canceled(flow_on: Flows) -> None:
    async with (
        Session([LocalExecutionBackend(num_workers=1)]) as one,
        Session([LocalExecutionBackend(num_workers=1)]) as two,
        flow_on(AsyncFlowBackend(one, name="one"), AsyncFlowBackend(two, name="two")) as flow,
    ):

        @flow.function_task(backend="two")
        async def wait(seconds: float) -> None:
            time.sleep(seconds)

        runs, future = started(two), wait(600)
        await within(runs.wait())
        future.cancel()
        await asyncio.wait([future])
        assert future.cancelled() and two.counts == {"CANCELED": 1} and not one.tasks
        await wait(0)


async def test_a_canceled_block_takes_its_tasks_along(flow: Flow, session: Session) -> None:
    @flow.function_task
    async def wait() -> None:
        time.sleep(600)

    @flow.block
    async def waiting() -> None:
        await wait()

    runs, block = started(session), waiting()
    await within(runs.wait())
    block.cancel()
    await within(session.wait_tasks(session.tasks))
    assert block.cancelled() and session.counts == {"CANCELED": 1}


async def test_the_end_of_a_flow_cancels_its_tasks_and_leaves_the_session_open(
    session: Session, flow_on: Flows
) -> None:
    backend = AsyncFlowBackend(session)
    async with flow_on(backend) as flow:
        future = await running_program(flow, session)
    assert future.cancelled()
    assert session.counts == {"CANCELED": 1} and not session.closed
    async with flow_on(backend) as flow:

        @flow.executable_task
        async def say() -> str:
            return "echo again"

        assert await say() == "again\n"
    assert len(backend.attached_to) == 2


async def test_a_session_keeps_nothing_of_flows_that_have_ended(session: Session, flow_on: Flows) -> None:
    for _ in range(3):
        async with flow_on(AsyncFlowBackend(session)) as flow:

            @flow.executable_task
            async def say() -> str:
                return "echo hello"

            assert await say() == "hello\n"
            assert (len(session.on_change), len(session.on_progress)) == (1, 1)
    assert not session.on_change and not session.on_progress


async def test_what_a_flow_raises_as_it_is_told_of_a_task_leaves_the_others_alone(
    session: Session, flow_on: Flows, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = AsyncFlowBackend(session)
    async with flow_on(backend) as flow:

        @flow.function_task
        async def number(value: int) -> int:
            return value

        told = backend._callback

        def fail(description: dict[str, Any], state: str) -> None:
            monkeypatch.setattr(backend, "_callback", told)
            raise RuntimeError("in the flow")

        monkeypatch.setattr(backend, "_callback", fail)
        assert await within(asyncio.gather(*map(number, range(5)))) == [0, 1, 2, 3, 4]
    assert "failed as it was told that" in caplog.text and "in the flow" in caplog.text


# --- services


async def test_a_service_is_ready_with_its_first_word_and_ends_with_the_flow(session: Session, flow_on: Flows) -> None:
    small = {"cores": 0.1}
    async with flow_on(AsyncFlowBackend(session)) as flow:

        @flow.function_task(service=True)
        async def serve_forever(task_description: dict[str, Any] = small) -> None:
            from rhapsody_mcp.task import progress

            progress(message="http://127.0.0.1:1")
            time.sleep(600)

        @flow.executable_task(service=True)
        async def database(task_description: dict[str, Any] = small) -> str:
            return """sh -c 'echo "{\\"message\\": \\"port 2\\"}" >> $RHAPSODY_PROGRESS; sleep 600'"""

        @flow.function_task
        async def use(*addresses: str) -> str:
            return " and ".join(addresses)

        assert await use(serve_forever(), database()) == "http://127.0.0.1:1 and port 2"
        assert session.counts == {"RUNNING": 2, "DONE": 1}
    assert session.counts == {"CANCELED": 2, "DONE": 1}


async def test_a_service_that_says_nothing_is_a_task(flow: Flow) -> None:
    @flow.function_task(service=True)
    async def short() -> int:
        return 3

    assert await short() == 3


# --- several flows


async def test_flows_at_a_time_over_one_session(session: Session, flow_on: Flows) -> None:
    async def run(start: int) -> int:
        async with flow_on(AsyncFlowBackend(session)) as flow:

            @flow.function_task
            async def add(number: int) -> int:
                return number + 1

            return int(await add(add(add(start))))

    assert await asyncio.gather(*(run(10 * number) for number in range(3))) == [3, 13, 23]


async def test_a_backend_whose_flow_has_tasks_is_refused_to_another_flow(
    session: Session, flow_on: Flows, tmp_path: Path
) -> None:
    backend = AsyncFlowBackend(session)
    async with flow_on(backend) as flow:
        await running_program(flow, session)
        with pytest.raises(InvalidRequest, match="give each flow an AsyncFlowBackend of its own"):
            await WorkflowEngine.create(backend, work_dir=str(tmp_path))


def test_the_package_is_imported_without_asyncflow() -> None:
    program = "import sys; sys.modules['radical'] = None; import rhapsody_mcp.integrations"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("takes_backend", [True, False])
async def test_a_flow_that_is_given_a_backend_or_a_session_is_told_what_it_takes(
    session: Session, takes_backend: bool
) -> None:
    with pytest.raises(AttributeError, match=r"'attached_to': a flow takes AsyncFlowBackend\(session\)"):
        await WorkflowEngine.create(session.backends[0] if takes_backend else session)


def test_a_backend_in_place_of_a_session_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="takes a session, not a LocalExecutionBackend"):
        AsyncFlowBackend(LocalExecutionBackend())  # type: ignore[arg-type]


async def test_a_command_with_a_task_that_has_not_ended_is_refused(flow: Flow) -> None:
    @flow.function_task
    async def one() -> int:
        return 1

    @flow.executable_task
    async def say(number: object) -> str:
        return f"echo {number}"

    with pytest.raises(InvalidTask, match="holds a task in place of its result: await the task first"):
        await within(say(one()))
    assert await within(say(await within(one()))) == "1\n"
