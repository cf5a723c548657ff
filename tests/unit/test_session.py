"""What a session promises whatever its backends are: routing, references, states, and what it refuses."""

from __future__ import annotations

import asyncio
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, ComputeTask, Part, RhapsodyError, Session, Source, TaskCanceled, TaskFailed
from rhapsody_mcp.backends.base import Event, Kind, Report, Running
from rhapsody_mcp.model.errors import BackendUnavailable, InvalidRequest, InvalidTask, SessionClosed, UnknownName
from rhapsody_mcp.model.outcome import Outcome
from rhapsody_mcp.model.specs import TaskRun, TaskSpec
from rhapsody_mcp.model.states import Cause, TaskState
from rhapsody_mcp.model.values import Reader, Stream
from rhapsody_mcp.runtime.tasks import ForEach
from rhapsody_mcp.testing import ScriptedBackend

pytestmark = pytest.mark.anyio


FUNCTIONS: tuple[Kind, ...] = ("function",)
PROMPTS: tuple[Kind, ...] = ("prompt",)


def echo(spec: TaskSpec, values: list[Any]) -> Any:
    return values or spec.uid


def fail(spec: TaskSpec, values: list[Any]) -> Any:
    raise ValueError("the script says no")


def work() -> None:
    raise NotImplementedError


async def test_a_task_is_updated_in_place_and_is_its_own_result() -> None:
    task = ComputeTask(function=work)
    assert (str(task.state), task.return_value, task.exception) == ("NEW", None, None)
    async with Session(backends=[await ScriptedBackend(echo)]) as session:
        futures = await session.submit_tasks([task])
        assert list(await asyncio.gather(*futures)) == [task]
        assert list(await asyncio.gather(task)) == [task]
    assert f"{task.state:>6}|{task.state}" == "  DONE|DONE"
    assert task.return_value == task.uid
    assert re.fullmatch(r"task\.\d{6}", task.uid)


async def test_the_objects_of_tasks_share_the_names_of_their_attributes() -> None:
    """Which Python does for up to 29 names; see `Task`."""
    tasks = [ComputeTask(function=work), ComputeTask(executable="true"), AITask("x")]
    async with Session(backends=[await ScriptedBackend(echo)]) as session:
        await asyncio.gather(*await session.submit_tasks(tasks))
    assert all(len(vars(task)) < 30 for task in tasks)


async def test_tasks_are_numbered_in_order_of_creation_over_both_kinds() -> None:
    tasks = [ComputeTask(work), AITask("x"), ComputeTask(executable="true")]
    numbers = [int(task.uid.removeprefix("task.")) for task in tasks]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


async def test_tasks_go_to_the_backend_they_name_or_the_first_that_runs_their_kind() -> None:
    compute = ScriptedBackend(echo, name="compute", kinds=("function", "executable"))
    inference = ScriptedBackend(echo, name="inference", kinds=PROMPTS)
    spare = ScriptedBackend(echo, name="spare")
    tasks = [ComputeTask(work), AITask("x"), ComputeTask(work, backend="spare")]
    async with Session([compute, inference, spare]) as session:
        await session.submit_tasks(tasks)
        await asyncio.gather(*tasks)
    assert [task.backend for task in tasks] == ["compute", "inference", "spare"]
    assert [task.get("backend") for task in tasks] == ["compute", "inference", "spare"]
    assert ["prompt" in task for task in tasks] == [False, True, False]


async def test_an_ai_task_has_its_answer_under_both_names() -> None:
    task = AITask("x")
    async with Session([ScriptedBackend(lambda spec, values: "forty-two")]) as session:
        await session.submit_tasks([task])
        await task
    assert task.response == task.return_value == "forty-two"


async def test_results_reach_the_tasks_that_need_them_in_any_order_of_submission() -> None:
    first, second = ComputeTask(work), ComputeTask(work)
    third = ComputeTask(work, args=({"deep": [first, (Part(second, "/0"),)]},))
    async with Session([ScriptedBackend(echo)]) as session:
        await session.submit_tasks([third, second, first])
        await third
        assert third.return_value == [first.uid, second.uid]
        later = AITask([first, "and"])
        await session.submit_tasks([later])
        await later
    assert later.return_value == [first.uid]


async def test_a_failure_cancels_everything_downstream_and_says_why() -> None:
    bad = ComputeTask(work)
    middle = ComputeTask(work, args=(bad,))
    last = ComputeTask(work, args=(middle,))
    async with Session([ScriptedBackend(fail)]) as session:
        await session.submit_tasks([bad, middle, last])
        await session.wait_tasks([bad, middle, last])
        late = ComputeTask(work, args=(bad,))
        await session.submit_tasks([late])
        await session.wait_tasks([late])
    assert (bad.state, bad.cause) == (TaskState.FAILED, Cause.ERROR)
    for task in (middle, last, late):
        assert (task.state, task.cause) == (TaskState.CANCELED, Cause.UPSTREAM)
    with pytest.raises(TaskFailed, match="the script says no") as raised:
        await bad
    assert raised.value.task is bad
    with pytest.raises(TaskCanceled, match=bad.uid):
        await last
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


async def test_a_failure_that_nobody_awaits_is_silent() -> None:
    async with Session([ScriptedBackend(fail)]) as session:
        futures = await session.submit_tasks([ComputeTask(work)])
        await asyncio.wait(futures)
        del futures


async def test_cancelling_a_waiter_does_not_cancel_the_task() -> None:
    backend = ScriptedBackend(echo)
    backend.may_finish.clear()
    task = ComputeTask(work)
    async with Session([backend]) as session:
        await session.submit_tasks([task])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0)
        with pytest.raises(TimeoutError, match="1 of 1 tasks"):
            await session.wait_tasks([task], timeout=0)
        backend.may_finish.set()
        assert await session.wait_tasks([task]) == [task]
    assert task.state is TaskState.DONE


async def test_closing_ends_every_task_and_takes_no_more() -> None:
    backend = ScriptedBackend(echo)
    backend.may_finish.clear()
    running = ComputeTask(work)
    waiting = ComputeTask(work, args=(running,))
    session = Session([backend])
    futures = await session.submit_tasks([running, waiting])
    await session.close()
    await asyncio.wait(futures)
    assert {running.state, waiting.state} == {TaskState.CANCELED}
    assert backend.closed
    with pytest.raises(SessionClosed):
        await session.submit_tasks([ComputeTask(work)])


async def test_cancel_ends_waiting_and_running_tasks_and_leaves_ended_ones() -> None:
    backend = ScriptedBackend(echo)
    done = ComputeTask(work)
    async with Session([backend]) as session:
        await session.submit_tasks([done])
        await done
        backend.may_finish.clear()
        running = ComputeTask(work)
        waiting = ComputeTask(work, args=(running,))
        await session.submit_tasks([running, waiting])
        await session.cancel([done, running, waiting])
    assert [task.state.value for task in (done, running, waiting)] == ["DONE", "CANCELED", "CANCELED"]


@pytest.mark.parametrize("error", [BackendUnavailable("no such machine"), AttributeError("no such machine")])
async def test_a_backend_that_does_not_start_fails_its_tasks_and_may_start_later(error: Exception) -> None:
    backend = ScriptedBackend(echo, start_error=error)
    lost, good = ComputeTask(work), ComputeTask(work)
    async with Session([backend]) as session:
        await session.submit_tasks([lost])
        await session.wait_tasks([lost])
        assert (lost.state, lost.cause) == (TaskState.FAILED, Cause.LOST)
        assert "no such machine" in str(lost.exception)
        backend.start_error = None
        await session.submit_tasks([good])
        await session.wait_tasks([good])
        assert good.state is TaskState.DONE


async def test_statistics_count_this_session_and_add_up() -> None:
    async with Session([ScriptedBackend(echo)]) as session:
        tasks = [ComputeTask(work) for _ in range(7)]
        await session.submit_tasks(tasks)
        await asyncio.gather(*tasks)
        statistics = session.get_statistics()
    assert statistics["summary"]["total_tasks"] == 7
    assert str(dict(statistics["counts"])) == "{'DONE': 7}"


# --- refused, whole


LOOP = ComputeTask(work, args=([],))
LOOP.args[0].append(LOOP)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([ComputeTask(work, backend="scriptd")], "unknown backend 'scriptd' (did you mean 'scripted'?)"),
        ([AITask("x", backend="compute")], "backend 'compute' runs no prompt. Valid: scripted."),
        ([ComputeTask(work, args=(ComputeTask(work),))], "is not in this session"),
        ([LOOP], "in a circle"),
        ([ComputeTask(work, args=(open,)), "task"], "not a str"),
    ],
)
async def test_a_wrong_submission_is_refused_whole(tasks: list[Any], words: str) -> None:
    good = ComputeTask(work)
    backends = [ScriptedBackend(echo), ScriptedBackend(echo, name="compute", kinds=FUNCTIONS)]
    async with Session(backends) as session:
        with pytest.raises(InvalidRequest, match=re.escape(words)):
            await session.submit_tasks([good, *tasks])
        assert session.tasks == []
        assert good.state is TaskState.NEW
        await session.submit_tasks([good])
        await good


async def test_arguments_that_cannot_travel_are_refused_at_submission() -> None:
    async with Session([ScriptedBackend(echo)]) as session:
        with pytest.raises(InvalidTask, match="cannot be sent to another process"):
            await session.submit_tasks([ComputeTask(work, args=((n for n in range(3)),))])


async def test_a_task_runs_once() -> None:
    task = ComputeTask(work)
    async with Session([ScriptedBackend(echo)]) as session:
        await session.submit_tasks([task])
        with pytest.raises(InvalidTask, match="submitted already"):
            await session.submit_tasks([task])
        await task


async def test_awaiting_a_task_before_submission_says_what_to_do() -> None:
    with pytest.raises(RhapsodyError, match="submit_tasks"):
        await ComputeTask(work)


def test_two_backends_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="two backends are named 'scripted'"):
        Session([ScriptedBackend(echo), ScriptedBackend(echo)])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x", "temperature": 3}, "temperature is 3; valid is a number from 0.0 to 2.0"),
        ({"prompt": "x", "top_p": 1.1}, "top_p is 1.1"),
        ({"prompt": "x", "top_k": 0}, "top_k is 0"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens is True"),
        ({"prompt": "x", "stop_sequences": "\n"}, "list of texts"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["x", 3]}, "prompt is a int"),
        ({"prompt": " "}, "is empty"),
        ({"prompt": "x", "temprature": 1}, "unknown field of AITask 'temprature' (did you mean 'temperature'?)"),
        ({"prompt": "x", "task_backend_specific_kwargs": {"ranks": 2}}, "unknown key"),
    ],
)
def test_an_ai_task_with_a_wrong_field_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidTask, match=re.escape(words)):
        AITask(**fields)


def kwargs(**values: Any) -> dict[str, Any]:
    return {"function": work, "task_backend_specific_kwargs": values}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "either function= or executable="),
        ({"function": work, "executable": "true"}, "either function= or executable="),
        ({"function": 3}, "cannot be called"),
        ({"function": work, "arguments": ["x"]}, "belongs to an executable"),
        ({"executable": "true", "args": (1,)}, "belong to a function"),
        ({"functoin": work}, "did you mean 'function'?"),
        (kwargs(proces_template={}), "did you mean 'process_template'?"),
        (kwargs(process_template={"envs": {}}), "did you mean 'env'?"),
        (kwargs(process_template={"policy": {"gpu": [0]}}), "unknown key of a policy 'gpu'"),
        (kwargs(process_template={"env": {"A=B": "x"}}), "no valid name"),
        (kwargs(process_template=[]), "is a dict"),
        (kwargs(process_template={}, process_templates=[(1, {})]), "contradict"),
        (kwargs(process_templates=[]), "as in [(2, {}), (2, {})]"),
        (kwargs(process_templates=[(0, {})]), "ranks is 0"),
        (kwargs(type="mpi", ranks=2, ranks_per_node=0), "ranks_per_node is 0; valid is a whole number of at least 1"),
        (kwargs(ranks_per_node=2), "ranks_per_node belongs to a job"),
        (kwargs(process_templates=[2]), "no pair"),
        (kwargs(type="mpy", ranks=2), 'the only type is "mpi"'),
        (kwargs(type="mpi"), "needs ranks"),
        (kwargs(type="mpi", ranks=2, pmi="slurm"), "pmi is 'slurm'"),
        (kwargs(ranks=2), 'belong to type="mpi"'),
        (kwargs(timeout=0), "timeout is 0"),
        (kwargs(timeout="1s"), "timeout is '1s'"),
    ],
)
def test_a_compute_task_with_a_wrong_field_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidTask, match=re.escape(words)):
        ComputeTask(**fields)


@pytest.mark.parametrize(
    ("text", "entry", "words"),
    [
        ("def f(:\n  pass", "", "line 1: "),
        ("x = 1\ndef f():\n  retrun 3", "", "line 3: invalid syntax in 'retrun 3'"),
        ("x = 1", "", "defines no function"),
        ("def train(): pass", "trian", "did you mean 'train'?"),
    ],
)
def test_a_source_that_cannot_run_is_refused_with_line_and_message(text: str, entry: str, words: str) -> None:
    with pytest.raises(InvalidTask, match=re.escape(words)):
        Source(text, entry)


@pytest.mark.parametrize(
    ("signature", "args", "named", "words"),
    [
        ("a, b=2", (), {}, "missing a required argument: 'a'"),
        ("a", (1, 2), {}, "too many positional arguments"),
        ("a, *, b", (1,), {}, "missing a required"),
        ("a", (1,), {"c": 3}, "unexpected keyword argument 'c'"),
        ("a, /", (), {"a": 1}, "a"),
    ],
)
def test_arguments_that_a_source_does_not_take_are_refused(
    signature: str, args: tuple[Any, ...], named: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidTask, match=words):
        ComputeTask(Source(f"def f({signature}): pass"), args=args, kwargs=named)


def test_arguments_that_a_source_takes_are_accepted() -> None:
    ComputeTask(Source("def f(a, /, b, *rest, c, d=4, **more): pass"), args=(1, 2, 3), kwargs={"c": 1, "e": 2})
    ComputeTask(Source("@decorated\ndef f(a): pass"), args=(1, 2, 3))


def test_an_unknown_name_survives_pickling() -> None:
    error = UnknownName("backend", "dragoon", ["dragon", "vllm"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "did you mean 'dragon'?" in str(error)


class Terse(ScriptedBackend):
    """Says of a task that it has ended, and not that it had started."""

    def submit(self, orders: Sequence[TaskRun], report: Report, read: Reader) -> None:
        def tell(event: Event) -> None:
            if not isinstance(event, Running):
                report(event)

        super().submit(orders, tell, read)


async def test_a_start_that_is_told_with_the_end_makes_the_for_each_run_all_the_same() -> None:
    async with Session([Terse(lambda spec, values: spec.uid)]) as session:
        states: list[str] = []
        session.on_change.add(lambda task: states.append(str(task.state)) if isinstance(task, ForEach) else None)
        parent = ForEach([1, 2], lambda item, number: ComputeTask(pow, args=(item, 2)))
        await session.submit_tasks([parent])
        await parent
        assert states == ["QUEUED", "RUNNING", "DONE"]
        assert all(child.started is not None for child in parent.children)


async def test_a_task_whose_output_is_gone_from_the_disk_ends_with_the_end_of_it(tmp_path: Path) -> None:
    gone = Stream(text="the end", file=str(tmp_path / "gone"), size=100_000)
    ended = Outcome(state=TaskState.DONE, started=1.0, ended=2.0, stdout=gone, stderr=gone)
    async with Session(backends=[await ScriptedBackend(lambda spec, values: ended)]) as session:
        task = ComputeTask(function=work)
        await session.submit_tasks([task])
        await session.wait_tasks([task], timeout=10)
    assert (task.state, task.stdout, task.stderr) == (TaskState.DONE, "the end", "the end")
