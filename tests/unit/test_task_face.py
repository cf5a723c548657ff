"""How a task reads: as a dict, a text, a pickle, an error; and what is said of the fields of other libraries."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, ComputeTask, InvalidTask, Module, Session, Source, TaskFailed, TaskState
from rhapsody_mcp.backends import LocalExecutionBackend

pytestmark = pytest.mark.anyio


class Unlucky(Exception):
    def __init__(self, number: int, why: str) -> None:
        super().__init__(number, why)
        self.number = number


def unlucky() -> None:
    raise Unlucky(13, "it is")


def unsendable() -> None:
    class Local(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("never")

    raise Local("stays there")


async def test_it_reads_as_a_dict_does() -> None:
    task = ComputeTask(executable="sh", arguments=["-c", "echo hello; exit 3"])
    assert (task.get("exit_code", "none"), "no_such" in task, task.get("no_such", 7)) == (None, False, 7)
    async with LocalExecutionBackend(num_workers=1) as backend, Session([backend]) as session:
        await session.submit_tasks(task)
        await session.wait_tasks(task, timeout=60)
    fields = dict(task)
    assert (task.get("exit_code"), "exit_code" in task, task["stdout"]) == (3, True, "hello\n")
    assert {"uid", "state", "exit_code", "return_value", "stdout", "cause", "timing"} <= fields.keys() == set(task)
    assert (fields["state"], fields["cause"]) == (TaskState.FAILED, "exit_code")
    with pytest.raises(KeyError, match=r"did you mean 'stdout'"):
        task["stdou"]


async def test_what_a_function_raised_is_the_cause_of_the_failure() -> None:
    async with LocalExecutionBackend(num_workers=1) as backend, Session([backend]) as session:
        kinds: list[dict[str, Any]] = [{}, {"process_template": {}}, {"process_templates": [(2, {})]}]
        for kwargs in kinds:
            task = ComputeTask(unlucky, task_backend_specific_kwargs=kwargs)
            await session.submit_tasks(task)
            with pytest.raises(TaskFailed, match="Unlucky") as caught:
                await task
            cause = caught.value.__cause__
            assert isinstance(cause, Unlucky) and cause.number == 13
            assert (caught.value.uid, caught.value.task) == (task.uid, task)
        task = ComputeTask(unsendable)
        await session.submit_tasks(task)
        with pytest.raises(TaskFailed, match="Local: stays there") as caught:
            await task
        assert caught.value.__cause__ is None
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.uid, str(again)) == (task.uid, str(caught.value))


async def test_it_pickles_before_and_after() -> None:
    task = ComputeTask(executable="echo", arguments=["hello"])
    assert pickle.loads(pickle.dumps(task)).state is TaskState.NEW
    async with LocalExecutionBackend(num_workers=1) as backend, Session([backend]) as session:
        await session.submit_tasks([task])
        await task
    again = pickle.loads(pickle.dumps(task))
    assert (again.uid, again.state, again.return_value, again.stdout) == (task.uid, "DONE", "hello", "hello\n")


@pytest.mark.parametrize(
    ("task", "shown"),
    [
        (ComputeTask(unlucky, name="first"), "<ComputeTask t first unlucky NEW>"),
        (ComputeTask(Source("def add(a):\n    return a"), args=(1,)), "<ComputeTask t add NEW>"),
        (ComputeTask(Module("package.module:run")), "<ComputeTask t package.module:run NEW>"),
        (ComputeTask(executable=Path("/bin/echo")), "<ComputeTask t /bin/echo NEW>"),
        (AITask("Why?", model="large"), "<AITask t large NEW>"),
    ],
    ids=["function", "source", "module", "program", "prompt"],
)
def test_its_text_tells_what_it_runs(task: ComputeTask | AITask, shown: str) -> None:
    task.uid = "t"
    assert repr(task) == shown


@pytest.mark.parametrize("field", ["cwd", "env", "shell", "timeout", "capture_stdio", "ranks"])
def test_fields_of_other_libraries_lead_to_the_right_place(field: str) -> None:
    with pytest.raises(InvalidTask, match=f"ComputeTask has no field '{field}'; write it as .*(=|task.stdout)"):
        ComputeTask(executable="true", **{field: "x"})  # type: ignore[arg-type]
    with pytest.raises(InvalidTask, match=r'A program goes in as executable="..."'):
        ComputeTask("/bin/echo")  # type: ignore[arg-type]


def test_a_policy_of_dragon_is_taken() -> None:
    policy = SimpleNamespace(host_name="", cpu_affinity=[0], gpu_affinity=[], placement=0)  # as Dragon's own
    task = ComputeTask(executable="true", task_backend_specific_kwargs={"process_template": {"policy": policy}})
    assert task.layout.templates[0].cpu_affinity == (0,)


@pytest.mark.parametrize("more", [{"type": "mpi"}, {"pmi": "auto"}, {"type": "mpi", "ranks": 3}])
def test_a_job_that_speaks_mpi_may_have_a_template_a_rank(more: dict[str, Any]) -> None:
    templates = [(1, {"env": {"ROLE": "head"}}), (2, {})]
    task = ComputeTask(executable="true", task_backend_specific_kwargs={"process_templates": templates, **more})
    assert (task.layout.pmi, task.layout.ranks) == ("auto", 3)
    assert [template.env for template in task.layout.templates] == [{"ROLE": "head"}, {}, {}]
    with pytest.raises(InvalidTask, match="process_templates make 3"):
        ComputeTask(
            executable="true",
            task_backend_specific_kwargs={"process_templates": templates, "type": "mpi", "ranks": 4},
        )
