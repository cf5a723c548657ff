"""What programs read of errors: stable codes, the task's id and the field; the words are tested where they arise."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

from rhapsody_mcp.api import AITask, ComputeTask, ForEach, Session, Source, UnknownName
from rhapsody_mcp.model import errors, outcome
from rhapsody_mcp.model.errors import InvalidTask, LedgerInUse, LimitExceeded, RhapsodyError
from rhapsody_mcp.runtime.requests.request_batch import make_tasks
from rhapsody_mcp.runtime.requests.task_request import TaskRequest
from rhapsody_mcp.serving.daemon.connection import ServiceUnavailable
from rhapsody_mcp.testing import ScriptedBackend
from tests.agents import open_agent

CODES = {
    "RhapsodyError": "failed",
    "InvalidRequest": "invalid_request",
    "InvalidTask": "invalid_task",
    "ResultGone": "result_gone",
    "InvalidSettings": "invalid_settings",
    "SchedulerRefusal": "scheduler_refused",
    "BackendError": "backend_failed",
    "BackendUnavailable": "backend_unavailable",
    "AllocationsUsedUp": "allocations_used_up",
    "SchedulerUnavailable": "scheduler_unavailable",
    "LedgerError": "ledger_failed",
    "LedgerInUse": "ledger_in_use",
    "LedgerTooNew": "ledger_too_new",
    "LedgerDamaged": "ledger_damaged",
    "LedgerUnavailable": "ledger_unavailable",
    "LimitExceeded": "limit_exceeded",
    "SessionClosed": "session_closed",
    "NotConfirmed": "not_confirmed",
    "NeedsForce": "needs_force",
    "TaskFailed": "task_failed",
    "TaskCanceled": "task_canceled",
}
"""Programs compare these: a code that changes breaks them."""


def test_every_error_has_a_code_of_its_own_that_stays() -> None:
    classes = {**vars(errors), **vars(outcome)}
    found = {
        name: one.code for name, one in classes.items() if isinstance(one, type) and issubclass(one, RhapsodyError)
    }
    assert found.pop("UnknownName") == "invalid_request", "each one has a code by its kind"
    assert found == CODES
    assert UnknownName("task", "x", []).code == "unknown_task"


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ComputeTask(), ""),
        (lambda: ComputeTask(print, arguments=["x"]), "arguments"),
        (lambda: ComputeTask(executable="a\0b"), "executable"),
        (lambda: ComputeTask(executable="echo", arguments=[b"x"]), "arguments"),
        (lambda: ComputeTask("echo"), "function"),  # type: ignore[arg-type]
        (lambda: ComputeTask(print, cwd="/tmp"), "cwd"),
        (lambda: ComputeTask(print, shell=True), "shell"),
        (lambda: ComputeTask(print, retrys=1), "retrys"),
        (lambda: ComputeTask(print, retries=-1), "retries"),
        (lambda: ComputeTask(print, retry_delay_s=-1), "retry_delay_s"),
        (lambda: ComputeTask(print, after=[1]), "after"),
        (lambda: ComputeTask(print, task_backend_specific_kwargs={"timeout": -1}), "timeout"),
        (lambda: ComputeTask(print, task_backend_specific_kwargs={"type": "mpi"}), "type"),
        (lambda: ComputeTask(print, task_backend_specific_kwargs={"process_template": {"env": 1}}), "env"),
        (lambda: ComputeTask(Source("def f(:"), args=()), "source"),
        (lambda: ComputeTask(Source("def f(): ...", "g"), args=()), "entry"),
        (lambda: ComputeTask(Source("def f(): ..."), args=(1,)), "args"),
        (lambda: AITask("x", temperature=3), "temperature"),
        (lambda: AITask("x", n=0), "n"),
        (lambda: AITask(""), "prompt"),
        (lambda: AITask(messages=[{"role": "me", "content": "x"}]), "messages"),
        (lambda: AITask("x", json_schema={"$ref": "x"}), "json_schema"),
        (lambda: ForEach("ab", lambda item, _: ComputeTask(print)), "items"),
    ],
)
def test_a_task_that_cannot_be_made_names_the_field(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        make()
    assert (caught.value.code, caught.value.field) == ("invalid_task", field)


@pytest.mark.anyio
async def test_a_submission_that_is_refused_names_the_task_and_the_field() -> None:
    async with Session([ScriptedBackend(print, kinds=["function"])]) as session:
        good = ComputeTask(print)
        for wrong, code, field in [
            (AITask("x"), "invalid_task", "backend"),
            (ComputeTask(print, args=(threading.Lock(),)), "invalid_task", ""),
        ]:
            with pytest.raises(InvalidTask) as caught:
                await session.submit_tasks([good, wrong])
            assert (caught.value.uid, caught.value.code, caught.value.field) == (wrong.uid, code, field)
        with pytest.raises(UnknownName) as unknown:
            await session.submit_tasks(ComputeTask(print, backend="scriptd"))
        facts = (unknown.value.code, unknown.value.field, unknown.value.name)
        assert facts == ("unknown_backend", "backend", "scriptd")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"source": "def f(): ...", "name": "task.000001"}, "name"),
        ({"source": "def f(): ...", "seed": 1}, "seed"),
        ({"executable": "echo", "arguments": [None]}, "arguments"),
        ({"prompt": "x", "backend": "scriptd"}, "backend"),
        ({"source": "def f(:"}, "source"),
    ],
)
async def test_a_request_that_is_refused_names_the_field(fields: dict[str, Any], field: str) -> None:
    async with open_agent() as agent:
        session = agent.sessions.get(await agent.session())
        with pytest.raises(InvalidTask) as caught:
            make_tasks([TaskRequest(**fields)], session)
        assert (caught.value.code, caught.value.field) == ("invalid_task", field)


def test_an_error_that_is_given_the_name_of_its_task_keeps_its_facts() -> None:
    error = InvalidTask("n is 0; valid is 1.", field="n")
    named = error.of_task("tasks[0]", "task.000001")
    assert (str(named), named.uid, named.field) == ("tasks[0]: n is 0; valid is 1.", "task.000001", "n")
    assert str(named.of_task("tasks[1]")) == "tasks[1]: n is 0; valid is 1.", "one name, not two"
    assert str(error) == "n is 0; valid is 1.", "the first one is as it was"


@pytest.mark.parametrize(
    "error",
    [
        InvalidTask("wrong", uid="task.000001", field="n"),
        InvalidTask("wrong", field="n").of_task("sweep[3]", "task.000004[3]"),
        LimitExceeded("too many", "max_tasks"),
        UnknownName("task", "x", ["y"]),
        LedgerInUse("/l", "h", 1, 2.0),
        ServiceUnavailable("gone"),
        outcome.TaskCanceled("t: canceled", None, None, "t"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_another_process_raises_has_its_facts_here(error: RhapsodyError) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied), vars(copied)) == (type(error), str(error), vars(error))
    assert (copied.code, copied.uid, copied.field) == (error.code, error.uid, error.field)
